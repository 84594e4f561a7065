"""Weight sync: copies sharded weights from one layout into another; planned once, run as often as they change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aligner.reshard.config import ReshardConfig
from aligner.reshard.message.bucket import Buffers
from aligner.reshard.message.storage import check_disjoint
from aligner.reshard.plan.layout import ExplicitLayout, WeightLayout
from aligner.reshard.plan.region import Layout
from aligner.reshard.plan.transfer_plan import TransferPlan, plan_transfer
from aligner.reshard.transfer.executor import execute, schedule_for
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reshard.transfer.wire import LastMessages
from aligner.reshard.weights import ShardedWeights, WritableWeights
from aligner.spmd.shared_memory import connect

if TYPE_CHECKING:
    from aligner.spmd.world import World


class WeightSync:
    """Copies `source` into `destination`, whose ranks may be the same, others, or some of each.

    Every rank of the world makes one, with its own view of both ends: making it is collective over the world, `run` over
    the ranks of both ends. On the CPU the message buffers, at most twice `config.bucket_mib`, are kept between runs.

    Args:
        source: read at every run; its memory must stay where it is.
        destination: written at every run.
        config: size of messages, proofs, shared memory, deltas.

    Raises:
        ValueError: the two ends are not of the same model; on every rank of both, naming the tensor.
    """

    def __init__(
        self, world: World, source: ShardedWeights, destination: WritableWeights, config: ReshardConfig
    ) -> None:
        self.source, self.destination, self.config = source, destination, config
        self.last_messages: LastMessages | None = {} if config.deltas else None
        self.buffers: Buffers | None = None
        self.ranks = tuple(sorted({*source.layout.ranks, *destination.layout.ranks}))
        self.group = world.group(self.ranks)
        """The ranks of both ends; None on any other rank."""
        self.stats: list[SyncStats] = []
        """What each run moved on this rank; empty on ranks of neither end."""
        self._world, self._runs = world, 0
        if self.group is None:
            return
        start = time.perf_counter()
        layouts = _agreed_layouts(world.rank, source, destination, self.ranks, self.group)
        self.plan = _plan_together(world.rank, *layouts, self.ranks, self.group)
        self.planning_seconds = time.perf_counter() - start
        if world.device.type == "cpu":  # on CUDA the caching allocator keeps freed memory
            shares = config.shared_memory and not config.deltas
            self.buffers = Buffers(world.device, connect(self.group, "reshard") if shares else None)
        else:
            # NCCL makes a group's communicator in its first collective, all members together.
            dist.all_reduce(torch.zeros(1, device=world.device), group=self.group)
        start = time.perf_counter()
        self.schedule = schedule_for(self.plan, config.bucket_bytes, self.buffers)
        self.planning_seconds += time.perf_counter() - start

    def run(self) -> None:
        """Copy the weights as they are now, and add its statistics to `stats`.

        Raises:
            RuntimeError: a proof failed (naming tensor, region and both ranks), or a peer did; see `execute`. The
                destination has no valid weights then: `destination.discard()`, and run again.
        """
        if self.group is None:
            return
        world, self._runs = self._world, self._runs + 1
        row = execute(
            self.plan,
            self.source.view if world.rank in self.source.layout.ranks else None,
            self.destination if world.rank in self.destination.layout.ranks else None,
            self.group,
            world.device,
            self.config.bucket_bytes,
            self.config.verify,
            self.last_messages,
            self.buffers,
            self._runs,
            lambda ranks: world.timeline.span("wait", "weights", ranks),
            self.schedule,
        )
        self.stats.append(row if self.stats else replace(row, seconds_plan=self.planning_seconds))


def _agreed_layouts(
    rank: int, source: ShardedWeights, destination: WritableWeights, ranks: Sequence[int], group: dist.ProcessGroup
) -> tuple[WeightLayout, WeightLayout]:
    """What the two ends hold; collective over `group`, whose world ranks are `ranks`.

    Each rank compares the pieces that it holds with what the layout says by arithmetic. Where all agree, as they should,
    nothing is exchanged: at a thousand ranks the layouts are gigabytes. Else every rank's pieces are.
    """
    held, wanted = source.pieces(), destination.pieces()
    agrees = set(held) == set(source.layout.layout(rank)) and set(wanted) == set(destination.layout.layout(rank))
    everywhere = [False] * len(ranks)
    dist.all_gather_object(everywhere, agrees, group=group)
    if all(everywhere):
        return source.layout, destination.layout
    return exchange_layouts(held, ranks, group), exchange_layouts(wanted, ranks, group)


def exchange_layouts(layout: Layout, ranks: Sequence[int], group: dist.ProcessGroup) -> ExplicitLayout:
    """Every rank's layout, of which each distinct one is sent once: replicas have the same."""
    digest = blake2b("\n".join(map(repr, layout)).encode(), digest_size=16).digest() if layout else b""
    digests: list[bytes] = [b""] * len(ranks)
    dist.all_gather_object(digests, digest, group=group)
    first = digests.index(digest) == dist.get_rank(group)
    sent: list[Any] = [None] * len(ranks)
    dist.all_gather_object(sent, layout if layout and first else None, group=group)
    layouts = {digest: received for digest, received in zip(digests, sent, strict=True) if received is not None}
    return ExplicitLayout({rank: layouts[digest] for rank, digest in zip(ranks, digests, strict=True) if digest})


def _plan_together(
    rank: int, source: WeightLayout, destination: WeightLayout, ranks: Sequence[int], group: dist.ProcessGroup
) -> TransferPlan:
    """This rank's plan; ValueError on every rank where one of them finds that the two ends do not match."""
    plan, failure = None, None
    try:
        _check_wanted(source.layout(rank), destination)
        plan = plan_transfer(rank, source, destination)
        check_disjoint(destination.layout(rank))
    except ValueError as error:
        failure = str(error)
    failures: list[str | None] = [None] * len(ranks)
    dist.all_gather_object(failures, failure, group=group)
    if plan is None or any(failures):
        raise ValueError(next(text for text in (failure, *failures) if text))
    return plan


def _check_wanted(held: Layout, destination: WeightLayout) -> None:
    """ValueError where the destination has no place for a tensor of the source: it is of another model."""
    for name in dict.fromkeys(piece.name for piece in held):
        if not destination.holders(name):
            raise ValueError(
                f"reshard: tensor {name}, held by the source, is wanted by no destination rank; "
                "build both sides from the same model.path"
            )
