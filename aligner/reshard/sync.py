"""One role's weights into another's: the plan made once, then run at every sync."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aligner.models.tensors import logical_tensors
from aligner.reshard.config import ReshardConfig
from aligner.reshard.message.bucket import Buffers
from aligner.reshard.message.storage import check_disjoint
from aligner.reshard.plan.region import Layout
from aligner.reshard.plan.transfer_plan import Plan, make_plan
from aligner.reshard.transfer.executor import execute
from aligner.reshard.transfer.shared_memory import meet
from aligner.reshard.transfer.sync_stats import SyncRow
from aligner.reshard.transfer.wire import Kept
from aligner.reshard.weights import ExplicitLayout, WeightLayout
from aligner.rollout.layout import EngineLayout
from aligner.trainer.megatron.layout import MegatronLayout

if TYPE_CHECKING:
    from aligner.rollout.role import Rollout
    from aligner.trainer.policy import Policy


class WeightSync:
    """Policy -> rollout. Making one is a collective of the whole world; `run` is one of the two roles' ranks.

    On the CPU the message buffers of a sync, at most twice `bucket_mib`, are kept for the next one.
    """

    def __init__(self, policy: Policy, rollout: Rollout, config: ReshardConfig) -> None:
        self.policy, self.rollout, self.config = policy, rollout, config
        self.kept: Kept | None = {} if config.deltas else None
        self.buffers: Buffers | None = None
        world = policy.world
        self.ranks = tuple(sorted({*policy.mesh.ranks, *rollout.mesh.ranks}))
        self.group = world.group(self.ranks)
        self.ledger: list[SyncRow] = []
        self._transfers = 0
        if self.group is None:
            return
        start = time.perf_counter()
        source, destination = sides(policy, rollout, self.ranks, self.group)
        self.plan = _plan_together(world.rank, source, destination, self.ranks, self.group)
        self.planning_seconds = time.perf_counter() - start
        if world.device.type == "cpu":  # on CUDA the caching allocator keeps freed memory
            shares = config.shared_memory and not config.deltas
            self.buffers = Buffers(world.device, meet(self.group) if shares else None)
        else:
            # NCCL makes a group's communicator in its first collective, all members together.
            dist.all_reduce(torch.zeros(1, device=world.device), group=self.group)

    def run(self) -> None:
        """Move the weights as they are now; the ledger gets a row."""
        if self.group is None:
            return
        policy, rollout = self.policy, self.rollout
        self._transfers += 1
        row = execute(
            self.plan,
            policy.model.view if policy.member else None,
            rollout.weights if rollout.member else None,
            self.group,
            policy.world.device,
            self.config.bucket_bytes,
            self.config.verify,
            self.kept,
            self.buffers,
            self._transfers,
            lambda ranks: policy.world.timeline.span("wait", "weights", ranks),
        )
        self.ledger.append(row if self.ledger else replace(row, seconds_plan=self.planning_seconds))


def sides(
    policy: Policy, rollout: Rollout, ranks: Sequence[int], group: dist.ProcessGroup
) -> tuple[WeightLayout, WeightLayout]:
    """What the two roles hold; collective over `group`, whose world ranks are `ranks`.

    Each rank compares what it holds with what its role's arithmetic says. Where all agree, as they should, nothing is
    exchanged: at a thousand ranks the layouts are gigabytes. Else the layouts themselves are.
    """
    rank = policy.world.rank
    held = policy.model.layout if policy.member else []
    wanted = rollout.weights.pieces(logical_tensors(policy.spec)) if rollout.member else []
    source = MegatronLayout(policy.spec, policy.mesh, policy.config.dtype)
    destination = EngineLayout(policy.spec, rollout.mesh, rollout.config.dtype, rollout.mesh.expert > 1)
    agree = set(held) == set(source.layout(rank)) and set(wanted) == set(destination.layout(rank))
    told = [False] * len(ranks)
    dist.all_gather_object(told, agree, group=group)
    return (source, destination) if all(told) else (exchanged(held, ranks, group), exchanged(wanted, ranks, group))


def exchanged(mine: Layout, ranks: Sequence[int], group: dist.ProcessGroup) -> ExplicitLayout:
    """Every rank's layout, of which each distinct one is sent once: replicas have the same."""
    digest = blake2b("\n".join(map(repr, mine)).encode(), digest_size=16).digest() if mine else b""
    digests: list[bytes] = [b""] * len(ranks)
    dist.all_gather_object(digests, digest, group=group)
    first = digests.index(digest) == dist.get_rank(group)
    told: list[Any] = [None] * len(ranks)
    dist.all_gather_object(told, mine if mine and first else None, group=group)
    layouts = {found: layout for found, layout in zip(digests, told, strict=True) if layout is not None}
    return ExplicitLayout({rank: layouts[found] for rank, found in zip(ranks, digests, strict=True) if found})


def _plan_together(
    rank: int, source: WeightLayout, destination: WeightLayout, ranks: Sequence[int], group: dist.ProcessGroup
) -> Plan:
    """This rank's plan; ValueError on every rank where one of them finds that the two sides do not match."""
    plan, failure = None, None
    try:
        plan = make_plan(rank, source, destination)
        check_disjoint(destination.layout(rank))
    except ValueError as error:
        failure = str(error)
    told: list[str | None] = [None] * len(ranks)
    dist.all_gather_object(told, failure, group=group)
    if plan is None or any(told):
        raise ValueError(next(text for text in (failure, *told) if text))
    return plan
