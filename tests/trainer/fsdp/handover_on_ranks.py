"""What ranks do in test_handover.py: a role goes on from what another saved, of other ranks, sizes or engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.policy import Policy
from aligner.trainer.trainable_role import TrainableRole
from tests.trainer.engines_on_ranks import (
    CASES,
    LENGTH_B,
    MASK_BT,
    PROMPT,
    ROLLOUT_BT,
    TOKENS_BT,
    Memory,
    exported_gap,
    fields,
    gap,
    start_head,
)


def check(
    world: World, model: Path, case: str, out: Path, first: dict[str, Any], then: dict[str, Any], changes: Any = None
) -> dict[str, float]:
    """Largest differences from one rank of Megatron, in two updates by `first` and a third by `then`, which loads its state.

    Args:
        first, then: the engine and the mesh, by name.
        changes: settings of all.
    """
    kind, config, _, loss, values = CASES[case]
    config = replace(config, **(changes or {}))
    spec = read_spec(model) if kind is Policy else with_scalar_head(read_spec(model))
    samples = Samples(
        TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8) // 2, [{}] * 8, ROLLOUT_BT
    )
    name = f"{model.name} {case} {first} {then} {changes}"

    def build(part: str, engine: str, ranks: tuple[int, ...], **sizes: int) -> TrainableRole:
        more: dict[str, Any] = {"total_steps": 20, "max_response": 20}
        if sizes.get("tensor", 1) > 1:  # Megatron's mixtures of experts want it
            more["sequence_parallel"] = True
        mesh = Mesh(ranks, name="policy", **sizes)
        return kind(f"{name} {part}", world, mesh, spec, replace(config, engine=engine), **more)

    def update(role: TrainableRole) -> dict[str, float]:
        placed = role.scatter(samples, group_size=2)
        return role.update(loss, placed, **fields(role, placed, **values)).gather()  # type: ignore[no-any-return]

    def differ(one: dict[str, float], other: dict[str, float]) -> float:
        return max(gap(one[each], other[each]) for each in one if each not in ("padding", "imbalance"))

    whole, role = build("whole", "megatron", (0,)), build("first", **first)
    if spec.stored_head is not spec.head:
        start_head(*(one for one in (whole, role) if one.member))
    worst = {"first": max(differ(update(whole), update(role)) for _ in range(2))}
    counters, *saved = role.save_state()
    of_rank_0 = [counters]
    dist.broadcast_object_list(of_rank_0)
    heir = build("then", **then)
    heir.load_state(of_rank_0[0], Memory(world, *saved))
    worst["taken over"] = exported_gap(role, heir, out / "taken_over")
    worst["then"] = differ(update(whole), update(heir))
    worst["weights"] = exported_gap(whole, heir, out / "weights")
    return worst
