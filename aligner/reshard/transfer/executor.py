"""Executes a transfer plan on one rank: pack, cast, checksum, send, write, prove."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from aligner.reshard.message.bucket import SHARED_MESSAGE_BYTES, Bucket, Buffers
from aligner.reshard.message.proof import View
from aligner.reshard.plan.schedule import STAGED, Message, Schedule, ScheduleStep, make_schedule, origin_rank
from aligner.reshard.plan.transfer_plan import Item, TransferPlan
from aligner.reshard.transfer.rank_transfer import RankTransfer
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reshard.transfer.wire import LastMessages, WaitSpan, Wire, make_wire
from aligner.reshard.weights import WritableWeights
from aligner.spmd.shared_memory import SLOTS


def execute(
    plan: TransferPlan,
    source: View | None,
    destination: WritableWeights | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
    bucket_bytes: int,
    verify: bool = True,
    last_messages: LastMessages | None = None,
    buffers: Buffers | None = None,
    transfer_number: int = 0,
    wait_span: WaitSpan | None = None,
    schedule: Schedule | None = None,
) -> SyncStats:
    """Execute `plan` on this rank; collective over the ranks that the plan gives something to send or receive.

    Ranks with nothing to do return at once. Data goes peer to peer in the steps of the plan's schedule, whose order
    cannot deadlock. While a step is on the wire what was received before is written and proven, the next step is packed
    and posted, and local copies are made. Staging takes at most twice `bucket_bytes` per rank (4 messages of half of it, in shared memory
    5 of two fifths), however many peers there are; local copies need none. It is freed afterwards, unless the caller gives the same `buffers` to every
    transfer: then they stay allocated in between, and no transfer waits for fresh memory. Buffers that have a
    `SharedMemoryChannel` send messages through shared memory.

    `group` holds all ranks of the plan (world ranks). gloo sends CPU buffers, whatever `device` is. With NCCL the
    group must have run a collective before: its communicator is made by all members together.

    The source's checksums are sent in front of its regions (not counted as bytes), through relays as well. The receiver
    compares them with what arrived, and that with what the destination's storage holds after the write (at once, where a
    large region arrives in the storage), before `written` lets the engine re-lay it out. Local copies are compared with
    their source. Each comparison comes right after its write: that no other piece overwrites it is what
    `storage.check_disjoint` says of the layout.
    A rank that fails completes its sends and receives, marked as failed, before it raises: nobody is left waiting.

    `source` and `destination` may be None on ranks that the plan asks for neither.

    `last_messages` (empty at first, the same object in every transfer of this plan) makes messages travel as deltas to
    the last transfer, where they are shorter; see `wire.DeltaWire`. `wait_span(ranks)` is entered around each wait for
    messages from and to these ranks. `transfer_number` numbers the transfers of a plan, alike on all ranks: with `verify`
    a message of another one is refused. `schedule` is `schedule_for` these arguments, for callers that run a plan often.

    Raises RuntimeError naming tensor, region, source rank and destination rank where a proof fails; also where another
    rank could not read its source. The first error of this rank is raised, whatever its type.
    """
    if not (plan.local or plan.streams or destination):
        return SyncStats()
    started = time.perf_counter()
    on_cpu = group is None or dist.get_backend(group) == "gloo"
    buffers = buffers or Buffers(torch.device("cpu") if on_cpu else device)
    buffers.transfer_number, buffers.single_part = transfer_number, last_messages is not None
    transfer = RankTransfer(plan.rank, source, destination, buffers, verify)
    schedule = schedule or schedule_for(plan, bucket_bytes, buffers)
    wire = make_wire(group, schedule, buffers, last_messages, wait_span)
    _Pipeline(transfer, wire, schedule).run()
    transfer.finish()
    seconds = transfer.clock.seconds()  # on CUDA this waits until the weights are there
    return SyncStats(
        moved_bytes=wire.sent_bytes,
        relayed_bytes=wire.relayed_bytes,
        received_bytes=wire.received_bytes,
        changed_bytes=wire.changed_bytes,
        minimum_bytes=plan.minimum_bytes,
        local_bytes=plan.local_bytes,
        checksummed=transfer.checksummed,
        seconds=time.perf_counter() - started,
        seconds_pack=seconds["pack"],
        seconds_wire=seconds["wire"],
        seconds_apply=seconds["apply"],
    )


def schedule_for(plan: TransferPlan, bucket_bytes: int, buffers: Buffers | None = None) -> Schedule:
    """The schedule by which `execute` carries out the plan with these buffers."""
    if buffers is None or buffers.channel is None:
        return make_schedule(plan, 2 * bucket_bytes)
    # A rank holds its slots, and of what it relays a copy of this step's message and of the next one's.
    message_bytes = min(2 * bucket_bytes // (SLOTS + 2), SHARED_MESSAGE_BYTES)
    return make_schedule(plan, STAGED * message_bytes, beside=True)


class _Posted(NamedTuple):
    """A step whose messages are in progress."""

    outgoing: Bucket | None
    incoming: Bucket | None
    requests: list[dist.Work]


class _Pipeline:
    """The messages between this rank and its peers, a step at a time."""

    def __init__(self, transfer: RankTransfer, wire: Wire, schedule: Schedule) -> None:
        self._transfer, self._wire, self._schedule = transfer, wire, schedule
        self._relays = Counter(step.send.content for step in schedule.steps if step.send and step.send.relay)
        self._to_relay: dict[object, Bucket] = {}
        """Received buckets that this rank has yet to relay, by content."""

    def run(self) -> None:
        steps, local = self._schedule.steps, self._schedule.local
        posted = self._post(steps[0]) if steps else None
        arrived: tuple[Message, Bucket] | None = None
        for number, step in enumerate(steps):
            if arrived:
                self._apply(*arrived)
                arrived = None  # its storages may be freed
            next_step = steps[number + 1] if number + 1 < len(steps) else None
            # The next step is posted before this one is waited for, so that the wire never waits for this rank; unless
            # it relays what this step receives.
            next_posted = self._post(next_step) if next_step and self._has_content(next_step) else None
            self._copy(local[len(local) * number // len(steps) : len(local) * (number + 1) // len(steps)])
            assert posted is not None
            arrived = self._wait(step, posted)
            posted = self._post(next_step) if next_step and next_posted is None else next_posted
        if arrived:
            self._apply(*arrived)
        if not steps:
            self._copy(local)

    def _copy(self, portions: Sequence[Sequence[Item]]) -> None:
        """Local copies; they are spread over the steps, so that modules fed by both complete early."""
        for items in portions:
            self._transfer.copy(items)

    def _has_content(self, step: ScheduleStep) -> bool:
        """Whether this rank has what it sends in the step."""
        return not (step.send and step.send.relay) or step.send.content in self._to_relay

    def _post(self, step: ScheduleStep) -> _Posted:
        transfer, send, receive = self._transfer, step.send, step.receive
        outgoing = incoming = None
        if send and send.relay:
            outgoing = self._to_relay[send.content]
        elif send:
            items = self._schedule.items(send)
            with transfer.clock("wire"):
                buffer = self._wire.send_buffer(transfer.buffers.layout(items).words)
            outgoing = transfer.pack(items, buffer)
        if receive:
            relayed = receive.content in self._relays
            if relayed or not self._wire.shared:
                incoming = Bucket(self._schedule.items(receive), transfer.buffers)
                if not relayed:  # a relay forwards the bucket as it was received
                    transfer.bind_storages(incoming)
        with transfer.clock("wire"):
            return _Posted(outgoing, incoming, self._wire.post(step, outgoing, incoming))

    def _wait(self, step: ScheduleStep, posted: _Posted) -> tuple[Message, Bucket] | None:
        """Complete the step; returns what it received."""
        transfer, send, receive = self._transfer, step.send, step.receive
        with transfer.clock("wire"):
            arrived = self._wire.wait(step, posted.requests, posted.incoming)
        if send and posted.outgoing:
            self._sent(send, posted.outgoing)
        if not (receive and arrived):
            return None
        transfer.finish_receive(self._wire, receive, arrived)
        if receive.content in self._relays:
            self._to_relay[receive.content] = arrived
        return receive, arrived

    def _sent(self, message: Message, bucket: Bucket) -> None:
        if message.relay:
            self._relays[message.content] -= 1
            if self._relays[message.content]:
                return
            del self._to_relay[message.content]
        if message.relay or not self._wire.shared:  # else it is the reader's to give back
            self._transfer.buffers.give(bucket)

    def _apply(self, message: Message, bucket: Bucket) -> None:
        self._transfer.apply(origin_rank(message), bucket, self._schedule.beside.get(message.content, {}))
        if message.content not in self._relays:
            self._transfer.buffers.give(bucket)
