"""Carrying out a plan: pack, cast, checksum, send, write, prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.reshard.bucket import Bucket, Buffers
from aligner.reshard.checksum import Checksum
from aligner.reshard.ledger import SyncRow
from aligner.reshard.plan import Item, Plan, buckets
from aligner.reshard.region import Piece

Source = Callable[[Piece], Tensor]
"""Reads a piece of this rank's source storages: a view of shape `piece.size`."""


class Destination(Protocol):
    """Storages that a transfer fills."""

    def view(self, piece: Piece) -> Tensor:
        """A writable view of the piece in the destination's storage, made plain first where the engine packed it."""

    def written(self, piece: Piece) -> None:
        """`piece` is written and proven; the destination counts elements and re-lays out what is complete."""

    def finish(self) -> None:
        """Everything was written exactly once and derived state is reset; else RuntimeError naming the tensor."""


def execute(
    plan: Plan,
    source: Source | None,
    destination: Destination | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
    bucket_bytes: int,
    verify: bool = True,
) -> SyncRow:
    """Carry out `plan` on this rank; collective over the ranks that the plan gives something to send or receive.

    Ranks with nothing to do return at once. Data goes peer to peer in rounds: in round k every rank posts its sends
    and receives of every pair's k-th bucket, all of them before it waits for any, and posts round k + 1 only when
    round k is complete; so by induction over the rounds every message finds its partner and no order of ranks can
    deadlock. While a round is on the wire the next one is packed and local copies are made. Staging takes at most 4
    `bucket_bytes` per rank (two rounds each way) and one bucket for local copies, however many peers there are.

    `group` holds all ranks of the plan (world ranks). gloo sends CPU buffers, whatever `device` is. With NCCL the
    group must have run a collective before: its communicator is made by all members together.

    Checksums of the packed regions travel in front of them (not counted as bytes); the receiver reads each region
    back from the destination's storage and compares before `written` lets the engine re-lay it out. Local copies are
    proven alike.
    A rank that fails completes its sends and receives, marked as failed, before it raises: nobody is left waiting.

    `source` and `destination` may be None on ranks that the plan asks for neither.

    Raises RuntimeError naming tensor, region, source rank and destination rank where a proof fails; also where another
    rank could not read its source. The first error of this rank is raised, whatever its type.
    """
    if not (plan.local or plan.sends or plan.receives or destination):
        return SyncRow()
    started = time.perf_counter()
    on_cpu = group is None or dist.get_backend(group) == "gloo"
    work = _Work(plan.rank, source, destination, torch.device("cpu") if on_cpu else device, verify)
    limit = max(1, bucket_bytes // max(1, plan.streams))
    sends = {to: buckets(items, limit) for to, items in plan.sends.items()}
    receives = {by: buckets(items, limit) for by, items in plan.receives.items()}
    own = buckets(plan.local, bucket_bytes)
    rounds = max((len(cut) for cut in (*sends.values(), *receives.values())), default=0)
    flight = _Flight(work, group, sends, receives)
    staged, arrived = flight.pack(0), flight.post_receives(0)
    flight.post_sends(staged)
    for number in range(rounds):
        staged = flight.pack(number + 1)
        # Local copies are spread over the rounds, so that modules fed by both complete early.
        for items in own[len(own) * number // rounds : len(own) * (number + 1) // rounds]:
            work.copy(items)
        with work.clock("wire"):
            flight.wait()
        landed, arrived = arrived, flight.post_receives(number + 1)
        flight.post_sends(staged)
        for by, bucket in landed.items():
            work.apply(by, bucket)
            work.buffers.give(bucket)
    if rounds == 0:
        for items in own:
            work.copy(items)
    work.finish()
    return SyncRow(
        moved_bytes=plan.moved_bytes,
        received_bytes=plan.received_bytes,
        minimum_bytes=plan.minimum_bytes,
        local_bytes=plan.local_bytes,
        checksummed=work.checksummed,
        seconds=time.perf_counter() - started,
        seconds_pack=work.seconds["pack"],
        seconds_wire=work.seconds["wire"],
        seconds_apply=work.seconds["apply"],
        seconds_verify=work.seconds["verify"],
    )


class _Flight:
    """The messages between this rank and its peers, a round at a time."""

    def __init__(
        self,
        work: _Work,
        group: dist.ProcessGroup | None,
        sends: Mapping[int, Sequence[Sequence[Item]]],
        receives: Mapping[int, Sequence[Sequence[Item]]],
    ) -> None:
        self._work, self._group, self._sends, self._receives = work, group, sends, receives
        self._posts: list[dist.P2POp] = []
        self._requests: list[dist.Work] = []
        self._staged: dict[int, Bucket] = {}

    def pack(self, number: int) -> dict[int, Bucket]:
        return {to: self._work.pack(cut[number]) for to, cut in sorted(self._sends.items()) if number < len(cut)}

    def post_receives(self, number: int) -> dict[int, Bucket]:
        """Empty buckets for what arrives in this round; they go out together with the round's sends."""
        arriving = {
            by: Bucket(cut[number], self._work.buffers)
            for by, cut in sorted(self._receives.items())
            if number < len(cut)
        }
        self._posts = [dist.P2POp(dist.irecv, bucket.words, by, self._group) for by, bucket in arriving.items()]
        return arriving

    def post_sends(self, staged: dict[int, Bucket]) -> None:
        self._posts += [dist.P2POp(dist.isend, bucket.words, to, self._group) for to, bucket in staged.items()]
        self._staged = staged  # alive until sent
        self._requests = dist.batch_isend_irecv(self._posts) if self._posts else []
        self._posts = []

    def wait(self) -> None:
        for request in self._requests:
            request.wait()
        for bucket in self._staged.values():
            self._work.buffers.give(bucket)
        self._staged = {}


class _Work:
    """What this rank does to buckets: it keeps the first error and goes on exchanging, so that no peer hangs."""

    def __init__(
        self, rank: int, source: Source | None, destination: Destination | None, device: torch.device, verify: bool
    ) -> None:
        self.buffers = Buffers(device)
        self.checksummed = 0
        self.seconds = dict.fromkeys(("pack", "wire", "apply", "verify"), 0.0)
        self._rank, self._source, self._destination = rank, source, destination
        self._checksum = Checksum(device) if verify else None
        self._failure: BaseException | None = None

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def pack(self, items: Sequence[Item]) -> Bucket:
        """A bucket of these items, read, cast and checksummed; marked as failed after this rank's first error."""
        bucket = Bucket(items, self.buffers)
        with self.clock("pack"), self._keep_failure():
            if self._failure is None:
                assert self._source is not None, f"rank {self._rank} sends {items[0]} but has no source"
                bucket.pack(self._source, self._checksum)
                return bucket
        bucket.mark_failed()
        return bucket

    def apply(self, by: int, bucket: Bucket) -> None:
        """Write what came from rank `by`, prove it, and tell the destination."""
        with self._keep_failure():
            if self._failure is not None:
                return
            if bucket.failed():
                raise RuntimeError(
                    f"reshard: rank {by} failed while it sent {bucket.items[0]} to rank {self._rank}; "
                    "its own error says why"
                )
            destination = self._destination
            assert destination is not None, f"rank {self._rank} receives {bucket.items[0]} but has no destination"
            with self.clock("apply"):
                bucket.write(destination.view)
            if self._checksum is not None:
                with self.clock("verify"):
                    bucket.prove(destination.view, self._checksum, by, self._rank)
                self.checksummed += len(bucket.items)
            with self.clock("apply"):
                for item in bucket.items:
                    destination.written(item.destination)

    def copy(self, items: Sequence[Item]) -> None:
        """Copy what this rank holds itself, by the same path as what travels."""
        if self._failure is None:
            bucket = self.pack(items)
            self.apply(self._rank, bucket)
            self.buffers.give(bucket)

    def finish(self) -> None:
        """Raise the first error, or let the destination finish."""
        if self._failure is not None:
            raise self._failure
        if self._destination is not None:
            with self.clock("apply"):
                self._destination.finish()

    @contextmanager
    def _keep_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as failure:
            if self._failure is None:
                self._failure = failure
