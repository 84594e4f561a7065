"""What ranks do in the methods' tests: a few steps of a method under several layouts, with one engine for all of them."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import zlib
from typing import Any

from aligner.algorithms import Step
from aligner.config.schema import Config, compose_config, to_config
from aligner.roles.build import Roles, build_roles
from aligner.run.batches import batches, training_rows
from aligner.run.job import Job
from aligner.run.prepare import prepare
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import Placement, make_meshes
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World

Row = dict[str, float]


class Bench:
    """The engine and the rules, which are made once, and what is trained, which is made for each run."""

    def __init__(self, world: World, rollout: Placement) -> None:
        self.world, self.rollout = world, rollout
        self.shared: dict[str, Role] = {}

    def roles(self, job: Job, layout: Config) -> Roles:
        """Fresh models under the placement and with the settings of models of `layout`, and the shared roles that the loop wants."""
        models = {name: getattr(layout, name) for name in ("policy", "reference", "critic", "reward_model")}
        config = dataclasses.replace(job.config, placement=layout.placement, **models)
        meshes = make_meshes(layout.placement, self.world.size)
        fresh = build(job, config, self.world, meshes, [r for r in job.roles if r not in ("rollout", "reward")])
        found = {role.name: role for role in fresh.built}
        if "rollout" in job.roles:
            layout = make_meshes(self.rollout, self.world.size)
            found["rollout"] = self._once("rollout", job, config, layout)
            rollout: Any = found["rollout"]
            rollout.calls, rollout.overlap = 0, config.stream  # the same seeds in every run
        if "reward" in job.roles:
            found["reward"] = self._once("reward", job, config, meshes, (config.reward, meshes["reward"]))
        return Roles(found)

    def _once(self, name: str, job: Job, config: Config, meshes: Any, of: Any = ()) -> Role:
        key = f"{name} {of}"
        if key not in self.shared:
            self.shared[key] = build(job, config, self.world, meshes, [name]).built[0]
        return self.shared[key]


def build(job: Job, config: Config, world: World, meshes: dict[str, Mesh], wanted: list[str]) -> Roles:
    return build_roles(config, wanted, world, meshes, job.checked.spec, job.checked.tokenizer)


def row_of(step: Step) -> Row:
    """Everything that a step tells, as the driver logs it."""
    row: Row = dict(step.metrics.gather()) if step.metrics is not None else {}
    for name, value in step.extra_metrics.items():
        row |= {f"{name}_{key}": n for key, n in value.gather().items()} if isinstance(value, Ref) else {name: value}
    if step.scores is not None:
        row |= step.scores.gather().row()
    if step.samples is not None:
        samples = step.samples.gather()
        row["samples"] = float(zlib.crc32(repr(samples.tokens_BT.tolist()).encode()))
    return row


def steps_of(job: Job, roles: Roles, steps: int) -> list[Row]:
    loop = job.loop(roles, batches(job.config, training_rows(job.config, job.checked)), job.settings)
    rows = [row_of(step) for step in itertools.islice(loop, steps)]
    loop.close()  # type: ignore[attr-defined]
    if "rollout" in job.roles:
        for started in list(roles.rollout.under_way):  # ahead of the last step
            roles.rollout.finish(started)
    return rows


def config_of(*overrides: str) -> Config:
    return to_config(compose_config(list(overrides), "quickstart"))


@functools.cache
def bench_of(world: World, base: tuple[str, ...]) -> Bench:
    return Bench(world, config_of(*base).placement)


def run_case(
    world: World, base: list[str], case: list[str], layouts: dict[str, list[str]], steps: int
) -> dict[str, list[Row]]:
    """A row for each step, under each of `layouts` (overrides of the placement, and of models' settings).

    Args:
        base: the overrides of every job; the engine stays for all jobs of one base.
        case: further overrides.
    """
    job = prepare(config_of(*base, *case), world.size)
    bench, found = bench_of(world, tuple(base)), {}
    for layout, overrides in layouts.items():
        found[layout] = steps_of(job, bench.roles(job, config_of(*base, *case, *overrides)), steps)
        gc.collect()
    return found
