"""One role's weights into another's: layouts exchanged once, the plan made once, then run at every sync."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aligner.models.family import logical_tensors
from aligner.reshard.executor import execute
from aligner.reshard.ledger import SyncRow
from aligner.reshard.plan import make_plan

if TYPE_CHECKING:
    from aligner.policy.policy import Policy
    from aligner.rollout.role import Rollout

BUCKET_BYTES = 64 << 20
"""Largest message, in bytes: bounds the extra memory of a sync."""


class WeightSync:
    """Policy -> rollout. Making one is a collective of the whole world; `run` is one of the two roles' ranks."""

    def __init__(self, policy: Policy, rollout: Rollout) -> None:
        self.policy, self.rollout = policy, rollout
        world = policy.world
        self.ranks = tuple(sorted({*policy.mesh.ranks, *rollout.mesh.ranks}))
        self.group = world.group(self.ranks)
        self.ledger: list[SyncRow] = []
        if self.group is None:
            return
        start = time.perf_counter()
        mine = (
            self.policy.model.layout if policy.member else [],
            rollout.weights.pieces(logical_tensors(policy.spec)) if rollout.member else [],
        )
        gathered: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(gathered, mine, group=self.group)
        sources = {rank: held for rank, (held, _) in zip(self.ranks, gathered, strict=True) if held}
        destinations = {rank: wanted for rank, (_, wanted) in zip(self.ranks, gathered, strict=True) if wanted}
        self.plan = make_plan(world.rank, sources, destinations)
        self.planning_seconds = time.perf_counter() - start
        if (
            world.device.type == "cuda"
        ):  # NCCL makes a group's communicator in its first collective, all members together
            dist.all_reduce(torch.zeros(1, device=world.device), group=self.group)

    def run(self) -> None:
        """Move the weights as they are now; the ledger gets a row."""
        if self.group is None:
            return
        policy, rollout = self.policy, self.rollout
        row = execute(
            self.plan,
            policy.model.view if policy.member else None,
            rollout.weights if rollout.member else None,
            self.group,
            policy.world.device,
            BUCKET_BYTES,
        )
        self.ledger.append(row)
