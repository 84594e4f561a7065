"""One rank of tools/bench/overhead.py: the real loop, driver, roles and transfers, with engines that do nothing.

Null engines skip the computation; everything around them is the product's own code.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.algorithms.grpo import GrpoConfig, grpo
from aligner.checkpoint.config import CheckpointConfig
from aligner.config.schema import Config, TrainConfig
from aligner.config.secrets import Mask
from aligner.data.config import DataConfig
from aligner.data.end_tokens import EndTokens
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.data.sets import DataSets
from aligner.health.startup import Startup
from aligner.objective.advantages import group_advantages
from aligner.objective.losses import clipped_surrogate
from aligner.report.config import LoggingConfig
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reward.components import reward_components
from aligner.reward.config import RewardConfig
from aligner.reward.role import Reward
from aligner.reward.worker import Score, Status
from aligner.roles.build import Roles
from aligner.rollout.config import StreamConfig
from aligner.rollout.kind import Responses
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.requests import Sample
from aligner.rollout.role import Rollout
from aligner.run import loop as driver_loop
from aligner.spmd import transfer
from aligner.spmd.mesh import Mesh
from aligner.spmd.role import Role
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.megatron.engine import MegatronEngine
from aligner.trainer.megatron.groups import make_groups
from aligner.trainer.policy import Policy, Reference
from aligner.trainer.update_metrics import StepReport, reduce_sums

GROUP = 8
"""Samples of each prompt."""
PROMPT = 128
"""Tokens of each prompt."""
WARM = 3
"""Steps before the measured ones."""
METRICS = ("token/clip_fraction", "token/ratio", "token/kl", "token/entropy", "token/gap", "sum/loss", "max/gap")
"""Of a GRPO update, so that its reductions are of the usual size."""


class NullEngine:
    """Returns responses of 3/8 to 7/8 of the longest row, determined by the seed."""

    def __init__(self, tokens: int) -> None:
        self.longest = tokens - PROMPT
        self.tokens, self.logp = list(range(100, 100 + self.longest)), [-1.0] * self.longest

    def check(self, prompts: Sequence[list[int]], sampling: Any) -> None:
        """Everything fits."""

    def resume(self, samples: Sequence[Sample], sampling: Any, step_tokens: int | None = None) -> int:
        """Generate immediately."""
        self.drawn = [
            Sample(one.prompt, one.seed, self.tokens[:n], self.logp[:n], [0] * n, ended=True)
            for one in samples
            for n in [self.longest * (3 + one.seed % 5) // 8]
        ]
        return 0

    def finish(self, ticket: int) -> list[Sample]:
        """Return the last result."""
        return self.drawn

    def close(self) -> None:
        """Nothing is held."""


class NullRollout(Rollout):
    """`Rollout` without vLLM."""

    def __init__(self, world: World, mesh: Mesh, tokens: int) -> None:
        Role.__init__(self, "rollout", world, mesh)
        self.sampling, self.seed, self.calls = None, 0, 0  # type: ignore[assignment]
        self.overlap, self.under_way, self.loaded = StreamConfig(), [], LoadedWeights()
        self._streams, self._saved = [], []
        world.my_group(mesh.groups("tensor", "pipeline"))
        self.engine = NullEngine(tokens)  # type: ignore[assignment]
        self.plays, self._responses = False, Responses(self.engine)
        self.shared, self._weight_owners = None, ()


class NullScorer:
    """Alternating rewards 0 and 1."""

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[Score]:
        return [Score(float(i % 2), Status.OK, 0.0) for i in range(len(items))]

    def close(self) -> None:
        """Nothing is held."""


class NullReward(Reward):
    """`Reward` without worker processes; responses have 4 characters per token."""

    def __init__(self, world: World, mesh: Mesh) -> None:
        Role.__init__(self, "reward", world, mesh)
        self.config, self.models = RewardConfig(), {}
        self.tokenizer = SimpleNamespace(decode=lambda tokens, **_: "abcd" * len(tokens))  # type: ignore[assignment]
        self.parts = reward_components(self.config)
        self.scorers = {part.name: NullScorer() for part in self.parts}
        self.keeps_scored, self._calls, self._scored = False, 0, {}


class NullTrainEngine:
    """The collectives of a `MegatronEngine`, without a model."""

    all_reduce_data, broadcast_output = MegatronEngine.all_reduce_data, MegatronEngine.broadcast_output

    def __init__(self, mesh: Mesh, groups: Any) -> None:
        self.mesh, self.groups = mesh, groups


class NullReference(Reference):
    """`Reference` without a model."""

    def __init__(self, name: str, world: World, mesh: Mesh) -> None:
        Role.__init__(self, name, world, mesh)
        self.config = PolicyConfig()
        groups = make_groups(world, mesh)
        self._engine = NullTrainEngine(mesh, groups) if groups is not None else None  # type: ignore[assignment]

    def forward(self, samples: Samples) -> Tensor:
        return torch.zeros(samples.tokens_BT.shape)


class NullSyncs:
    """`WeightSyncs` that move nothing."""

    def __init__(self) -> None:
        self.rows: list[SyncStats] = []

    def run(self, policy: Policy, rollout: Rollout) -> None:
        with policy.call("reshard_to", also=(rollout,)), rollout.loaded.loading(policy):
            if policy.member or rollout.member:
                self.rows = [SyncStats(moved_bytes=1 << 30, seconds=1.0)]

    def latest(self) -> list[SyncStats]:
        return self.rows


class NullPolicy(NullReference, Policy):
    """`Policy` without a model: an update only sums its metrics over the ranks."""

    def __init__(self, world: World, mesh: Mesh) -> None:
        NullReference.__init__(self, "policy", world, mesh)
        self.optimizer_steps = self.version = self.max_response = 0
        self.syncs = NullSyncs()

    def _step(self, loss: Any, together: int, samples: Samples, fields: dict[str, Any]) -> StepReport:
        totals = self._totals(samples)
        sums = {name: torch.zeros((), dtype=torch.float64) for name in METRICS}
        return StepReport(reduce_sums(self.engine, self.world, self.mesh.ranks, sums), totals)


class Meter:
    """Measures this rank's CPU seconds by part, and its messages."""

    def __init__(self) -> None:
        self.cpu: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._open: list[list[Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager: the main thread's CPU seconds inside, without nested parts."""
        self._open.append([time.thread_time(), 0.0])
        try:
            yield
        finally:
            start, inner = self._open.pop()
            taken = time.thread_time() - start
            self.cpu[name] += taken - inner
            if self._open:
                self._open[-1][1] += taken

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Attribute a function's CPU seconds to `name` from here on."""
        inner = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, function, timed)

    def install(self) -> None:
        """Install the measurements, before any role is built."""
        self._count_messages()
        call = Role.call

        @contextmanager
        def timed_call(role: Role, method: str, *also: Any, **more: Any) -> Iterator[None]:
            with self.part(method), call(role, method, *also, **more):
                yield

        Role.call = timed_call  # type: ignore[method-assign]
        self.watch(Role, "localize", "values")
        self.watch(driver_loop, "step_row", "end of the step")
        self.watch(driver_loop.Driver, "_log", "metrics")

    def _count_messages(self) -> None:
        send = dist.isend

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent["messages"] += 1
            self.sent["bytes"] += tensor.numel() * tensor.element_size()
            return send(tensor, *args, **kwargs)

        dist.isend = counted
        for name in ("all_gather_object", "all_reduce", "broadcast", "barrier"):
            self._count_collective(name, getattr(dist, name))

    def _count_collective(self, name: str, inner: Callable[..., Any]) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent["collectives"] += 1
            return inner(*args, **kwargs)

        setattr(dist, name, counted)


class MarkingDriver(driver_loop.Driver):
    """The driver, with a mark at the start of every step."""

    meter: Meter
    marks: list[dict[str, Any]]

    def _at(self, step: int) -> None:
        super()._at(step)
        mark: dict[str, Any] = {"wall": time.perf_counter(), "cpu": time.process_time(), "main": time.thread_time()}
        self.marks.append(mark | {"parts": dict(self.meter.cpu), "sent": dict(self.meter.sent)})


def meshes_of(ranks: int, split: bool) -> dict[str, Mesh]:
    """Policy and reference with tensor=2 where that is possible, rollout and reward with one rank a replica."""
    policy = tuple(range(ranks // 2)) if split else tuple(range(ranks))
    others = tuple(range(ranks // 2, ranks)) if split else policy
    tensor = 2 if len(policy) % 2 == 0 else 1
    sizes = {"policy": tensor, "reference": tensor, "rollout": 1, "reward": 1}
    places = {"policy": policy, "reference": policy, "rollout": others, "reward": others}
    return {name: Mesh(places[name], tensor=sizes[name], name=name) for name in sizes}


def run_rank(ranks: int, rows: int, tokens: int, split: bool, steps: int, folder: Path) -> None:
    """Build the roles, run the loop, and write this rank's measurements to `folder`. Does not return."""
    begin = time.perf_counter()
    torch.set_num_threads(1)
    world = World(120.0)
    try:
        dist.barrier()
        started = time.perf_counter()
        meter = Meter()
        meter.install()
        meshes = meshes_of(ranks, split)
        roles = Roles(
            {
                "policy": NullPolicy(world, meshes["policy"]),
                "reference": NullReference("reference", world, meshes["reference"]),
                "rollout": NullRollout(world, meshes["rollout"], tokens),
                "reward": NullReward(world, meshes["reward"]),
            }
        )
        dist.barrier()
        built = time.perf_counter()
        driver = MarkingDriver(_job(rows // GROUP, WARM + steps, folder), world, roles)  # type: ignore[arg-type]
        driver.meter, driver.marks = meter, []
        driver.run()
        start = {"world": started - begin, "groups": built - started}
        measurements = {"start": start, "marks": driver.marks[WARM:], "memory": _memory()}
        (folder / f"rank{world.rank}.json").write_text(json.dumps(measurements))
    except BaseException as error:
        world.fail(error)
    world.leave()


def _job(prompts: int, steps: int, folder: Path) -> Any:
    data = [
        Prompt(tuple(range(PROMPT)), "p" * 4 * PROMPT, {"prompt": "p" * 4 * PROMPT, "answer": "42"}, i)
        for i in range(4 * prompts)
    ]
    config = Config(
        data=DataConfig(prompts_per_step=prompts),
        logging=LoggingConfig(console=False, timeline_steps=0, samples_every=0),
        train=TrainConfig(steps=steps, eval_every=0, save=False, report=False),
        checkpoint=CheckpointConfig(every=0),
        run_dir=str(folder / "run"),
    )
    settings = GrpoConfig(group_size=GROUP, advantages=partial(group_advantages, normalize="std"),
                          loss=partial(clipped_surrogate, clip_low=0.2, clip_high=0.28))  # fmt: skip
    more = {
        "checked": SimpleNamespace(data=DataSets(data), heldout=[], ends=EndTokens({}), best_metric=None),
        "mask": Mask(),
    }
    more |= {"inputs": {}, "lease": None, "startup": Startup()}
    return SimpleNamespace(config=config, loop=grpo, settings=settings, roles=settings.roles, **more)


def _memory() -> int:
    """Private memory of this process, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def environment(rank: int, ranks: int, port: int) -> None:
    """The environment variables that torchrun sets."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=f"overhead-{port}")  # fmt: skip


__all__ = ["environment", "run_rank", "transfer"]
