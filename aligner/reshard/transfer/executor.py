"""Carrying out a plan: pack, cast, checksum, send, write, prove."""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.message.proof import View
from aligner.reshard.plan.schedule import STAGED, Message, Schedule, Step, packed_by, schedule_of
from aligner.reshard.plan.transfer_plan import Plan
from aligner.reshard.transfer.rank_transfer import RankTransfer
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reshard.transfer.wire import LastMessages, Waiting, Wire, wire_of
from aligner.reshard.weights import WritableWeights


def execute(
    plan: Plan,
    source: View | None,
    destination: WritableWeights | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
    bucket_bytes: int,
    verify: bool = True,
    kept: LastMessages | None = None,
    buffers: Buffers | None = None,
    transfer: int = 0,
    waiting: Waiting | None = None,
) -> SyncStats:
    """Carry out `plan` on this rank; collective over the ranks that the plan gives something to send or receive.

    Ranks with nothing to do return at once. Data goes peer to peer in the steps of the plan's schedule, whose order
    cannot deadlock. While a step is on the wire what came in before is written and proven, the next step is packed and
    posted, and local copies are made. Staging takes at most 4 messages of half `bucket_bytes` per rank, however many
    peers there are; local copies need none. It is freed afterwards, unless the caller gives the same `buffers` to every
    transfer: then as much stays taken in between, and no transfer waits for fresh memory. Buffers that have a
    `SharedMemoryChannel` hand messages over in shared memory.

    `group` holds all ranks of the plan (world ranks). gloo sends CPU buffers, whatever `device` is. With NCCL the
    group must have run a collective before: its communicator is made by all members together.

    The source's checksums travel in front of its regions (not counted as bytes), through relays as well. The receiver
    compares them with what arrived, and that with what the destination's storage holds after the write (at once, where a
    large region arrives in the storage), before `written` lets the engine re-lay it out. Local copies are compared with
    their source. Each comparison comes right after its write: that no other piece overwrites it is what
    `storage.check_disjoint` says of the layout.
    A rank that fails completes its sends and receives, marked as failed, before it raises: nobody is left waiting.

    `source` and `destination` may be None on ranks that the plan asks for neither.

    `kept` (empty at first, the same object in every transfer of this plan) makes messages travel as what changed since
    the last transfer, where that is shorter; see `wire.DeltaWire`. `waiting(ranks)` is entered around each wait for messages
    from and to these ranks. `transfer` numbers the transfers of a plan, alike on all ranks: with `verify` a message of
    another one is refused.

    Raises RuntimeError naming tensor, region, source rank and destination rank where a proof fails; also where another
    rank could not read its source. The first error of this rank is raised, whatever its type.
    """
    if not (plan.local or plan.streams or destination):
        return SyncStats()
    started = time.perf_counter()
    on_cpu = group is None or dist.get_backend(group) == "gloo"
    buffers = buffers or Buffers(torch.device("cpu") if on_cpu else device)
    buffers.transfer, buffers.together = transfer, kept is not None
    work = RankTransfer(plan.rank, source, destination, buffers, verify)
    schedule = schedule_of(plan, int(min(2 * bucket_bytes, STAGED * buffers.most_bytes)))
    wire = wire_of(group, schedule, buffers, kept, waiting)
    _Pipeline(work, wire, schedule).run()
    work.finish()
    return SyncStats(
        moved_bytes=wire.sent_bytes,
        relayed_bytes=wire.relayed_bytes,
        received_bytes=wire.received_bytes,
        changed_bytes=wire.changed_bytes,
        minimum_bytes=plan.minimum_bytes,
        local_bytes=plan.local_bytes,
        checksummed=work.checksummed,
        seconds=time.perf_counter() - started,
        seconds_pack=work.seconds["pack"],
        seconds_wire=work.seconds["wire"],
        seconds_apply=work.seconds["apply"],
    )


class _Posted(NamedTuple):
    """A step that is under way."""

    leaving: Bucket | None
    arriving: Bucket | None
    requests: list[dist.Work]


class _Pipeline:
    """The messages between this rank and its peers, a step at a time."""

    def __init__(self, work: RankTransfer, wire: Wire, schedule: Schedule) -> None:
        self._work, self._wire, self._schedule = work, wire, schedule
        self._relays = Counter(step.send.content for step in schedule.steps if step.send and step.send.relay)
        self._passing: dict[object, Bucket] = {}
        """What came in and has to go on to others."""

    def run(self) -> None:
        work, steps, local = self._work, self._schedule.steps, self._schedule.local
        now = self._post(steps[0]) if steps else None
        arrived: tuple[Message, Bucket] | None = None
        for number, step in enumerate(steps):
            if arrived:
                self._apply(*arrived)
                arrived = None  # the storages that it came for may go
            after = steps[number + 1] if number + 1 < len(steps) else None
            # The next step is posted before this one is waited for, so that the wire never waits for this rank; but
            # not what this step brings first.
            then = self._post(after) if after and self._here(after) else None
            # Local copies are spread over the steps, so that modules fed by both complete early.
            for items in local[len(local) * number // len(steps) : len(local) * (number + 1) // len(steps)]:
                work.copy(items)
            assert now is not None
            arrived = self._wait(step, now)
            now = self._post(after) if after and then is None else then
        if arrived:
            self._apply(*arrived)
        for items in () if steps else local:
            work.copy(items)

    def _here(self, step: Step) -> bool:
        """Whether this rank has what it sends in the step."""
        return not (step.send and step.send.relay) or step.send.content in self._passing

    def _post(self, step: Step) -> _Posted:
        work, send, receive = self._work, step.send, step.receive
        leaving = arriving = None
        if send and send.relay:
            leaving = self._passing[send.content]
        elif send:
            items = self._schedule.items(send)
            with work.clock("wire"):
                room = self._wire.room(work.buffers.layout(items).words)
            leaving = work.pack(items, room)
        if receive:
            passed_on = receive.content in self._relays
            if passed_on or not self._wire.shared:
                arriving = Bucket(self._schedule.items(receive), work.buffers)
                if not passed_on:  # what is passed on stays as it came
                    work.open(arriving)
        with work.clock("wire"):
            return _Posted(leaving, arriving, self._wire.post(step, leaving, arriving))

    def _wait(self, step: Step, posted: _Posted) -> tuple[Message, Bucket] | None:
        """The step is done; gives what it brought."""
        work, send, receive = self._work, step.send, step.receive
        with work.clock("wire"):
            arrived = self._wire.wait(step, posted.requests, posted.arriving)
        if send and posted.leaving:
            self._sent(send, posted.leaving)
        if not (receive and arrived):
            return None
        work.land(self._wire, receive, arrived)
        if receive.content in self._relays:
            self._passing[receive.content] = arrived
        return receive, arrived

    def _sent(self, message: Message, bucket: Bucket) -> None:
        if message.relay:
            self._relays[message.content] -= 1
            if self._relays[message.content]:
                return
            del self._passing[message.content]
        if message.relay or not self._wire.shared:  # else it is the reader's to give back
            self._work.buffers.give(bucket)

    def _apply(self, message: Message, bucket: Bucket) -> None:
        self._work.apply(packed_by(message), bucket)
        if message.content not in self._relays:
            self._work.buffers.give(bucket)
