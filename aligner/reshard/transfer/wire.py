"""How buckets are sent: by point-to-point messages, through shared memory, or as deltas to the last transfer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.reshard.message import delta
from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.plan.region import STORED_BYTES
from aligner.reshard.plan.schedule import Message, Schedule, ScheduleStep
from aligner.spmd.shared_memory import SharedMemoryChannel

LastMessages = dict[object, Tensor]
"""Content of a message -> its payload in the last transfer: as much memory as a rank sends and receives."""

WaitSpan = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Entered around each wait for messages from and to these ranks."""


class Wire(Protocol):
    """Carries the messages of one transfer and counts their bytes, without headers."""

    sent_bytes: int
    relayed_bytes: int
    received_bytes: int
    changed_bytes: int
    """Bytes of received elements that differ from the last transfer's; all bytes where the last message was not kept."""
    shared: bool
    """Whether messages are read where their sender wrote them, so that no buffer is needed to receive one."""

    def send_buffer(self, words: int) -> Tensor | None:
        """Where to pack a message of `words` 64-bit words; None: in any buffer."""

    def post(self, step: ScheduleStep, outgoing: Bucket | None, incoming: Bucket | None) -> list[dist.Work]:
        """Start a step's send and receive."""

    def wait(self, step: ScheduleStep, requests: Sequence[dist.Work], incoming: Bucket | None) -> Bucket | None:
        """Wait for a posted step to complete. Returns the bucket that came in."""

    def finish_receive(self, message: Message, bucket: Bucket) -> None:
        """Restore the whole bucket from what was received (a delta, perhaps), and count it. RuntimeError where it cannot be."""


class PointToPoint:
    """Buckets as they are, by isend and irecv of the process group."""

    shared = False

    def __init__(self, group: dist.ProcessGroup | None, wait_span: WaitSpan) -> None:
        self._group, self._wait_span = group, wait_span
        self.sent_bytes = self.relayed_bytes = self.received_bytes = self.changed_bytes = 0

    def send_buffer(self, words: int) -> Tensor | None:
        return None

    def post(self, step: ScheduleStep, outgoing: Bucket | None, incoming: Bucket | None) -> list[dist.Work]:
        operations = []
        if step.send and outgoing:
            self._count(step.send, outgoing.payload_bytes)
            operations += [self._send_op(step.send, part) for part in outgoing.parts]
        if step.receive and incoming:
            operations += [self._receive_op(step.receive, part) for part in incoming.parts]
        return list(dist.batch_isend_irecv(operations))

    def wait(self, step: ScheduleStep, requests: Sequence[dist.Work], incoming: Bucket | None) -> Bucket | None:
        with self._wait_span(
            [*([step.send.receiver] if step.send else []), *([step.receive.sender] if step.receive else [])]
        ):
            for request in requests:
                request.wait()
        return incoming

    def finish_receive(self, message: Message, bucket: Bucket) -> None:
        self.received_bytes += bucket.payload_bytes
        self.changed_bytes += bucket.payload_bytes

    def _count(self, message: Message, amount: int) -> None:
        self.sent_bytes += amount
        self.relayed_bytes += amount if message.relay else 0

    def _send_op(self, message: Message, data: Tensor) -> dist.P2POp:
        return dist.P2POp(dist.isend, data, message.receiver, self._group)

    def _receive_op(self, message: Message, data: Tensor) -> dist.P2POp:
        return dist.P2POp(dist.irecv, data, message.sender, self._group)


class SharedMemoryWire(PointToPoint):
    """Buckets in memory that sender and receiver both map: packed there, and read from there.

    What a rank relays it copies out first, so that its sender never waits for a relay, and in again for each reader.
    So whoever waits for a message, or for a slot, waits for a step that comes before its own.
    """

    shared = True

    def __init__(self, channel: SharedMemoryChannel, buffers: Buffers, schedule: Schedule, wait_span: WaitSpan) -> None:
        super().__init__(None, wait_span)
        self._channel, self._buffers, self._schedule = channel, buffers, schedule

    def send_buffer(self, words: int) -> Tensor:
        slot = self._channel.slot(words)
        if slot is not None:
            return slot
        with self._wait_span(self._channel.readers):
            self._channel.wait_for_slot()
        return self.send_buffer(words)

    def post(self, step: ScheduleStep, outgoing: Bucket | None, incoming: Bucket | None) -> list[dist.Work]:
        if step.send and outgoing:
            self._count(step.send, outgoing.payload_bytes)
            message = outgoing.buffer
            if step.send.relay:
                message = self.send_buffer(outgoing.whole.numel()).copy_(outgoing.whole)
            self._channel.send(step.send.receiver, message)
        return []

    def wait(self, step: ScheduleStep, requests: Sequence[dist.Work], incoming: Bucket | None) -> Bucket | None:
        if step.receive is None:
            return None
        with self._wait_span([step.receive.sender]):
            message = self._channel.receive(step.receive.sender)
        items = self._schedule.items(step.receive)
        if message.numel() != self._buffers.layout(items).words:
            raise RuntimeError(
                f"reshard: rank {step.receive.sender} sent a message of {message.nbytes} bytes where {items[0]} and "
                f"{len(items) - 1} more make {8 * self._buffers.layout(items).words}: the ranks' plans differ"
            )
        if incoming is None:
            return Bucket(items, self._buffers, message)
        incoming.whole.copy_(message)
        self._channel.release(message)
        return incoming


class DeltaWire(PointToPoint):
    """Buckets of one part, as their header and a delta where that is shorter, else whole; relays forward what they got.

    Lengths are known only when a bucket is packed, so each is sent in front of its message. The receiver restores the
    whole bucket from the delta and the last message: checksums, write and proof are as without deltas. Staging grows by
    the outgoing and the incoming delta, each smaller than its bucket.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, last_messages: LastMessages, schedule: Schedule, wait_span: WaitSpan
    ) -> None:
        super().__init__(group, wait_span)
        self._last_messages = last_messages
        self._unsent = Counter(step.send.content for step in schedule.steps if step.send and not step.send.relay)

    def post(self, step: ScheduleStep, outgoing: Bucket | None, incoming: Bucket | None) -> list[dist.Work]:
        """In the order of all messages: a rank that waits for a length has sent all that others may wait for before."""
        requests: list[dist.Work] = []
        for message in sorted(message for message in step if message):
            if outgoing and message is step.send:
                requests += self._send(message, outgoing)
            elif incoming:
                requests += self._receive(message, incoming)
        return requests

    def _send(self, message: Message, bucket: Bucket) -> list[dist.Work]:
        data = self._encode(message, bucket)
        length = torch.tensor([data.numel()], device=data.device)
        return [work for part in (length, data) for work in dist.batch_isend_irecv([self._send_op(message, part)])]

    def _receive(self, message: Message, bucket: Bucket) -> list[dist.Work]:
        length = torch.zeros(1, dtype=torch.int64, device=bucket.words.device)
        for request in dist.batch_isend_irecv([self._receive_op(message, length)]):
            request.wait()
        buffer = bucket.words.view(torch.uint8)
        if int(length) != buffer.numel():
            buffer = bucket.delta = buffer.new_empty(int(length))
        return list(dist.batch_isend_irecv([self._receive_op(message, buffer)]))

    def finish_receive(self, message: Message, bucket: Bucket) -> None:
        data, last = bucket.delta, self._last(message, bucket)
        self.received_bytes += self._length(bucket)
        if data is None:
            self.changed_bytes += bucket.payload_bytes if last is None else _changed_bytes(bucket, last)
            self._keep(message, bucket)
            return
        if last is None:
            raise RuntimeError(
                f"reshard: rank {message.sender} sent changes of {bucket.items[0]}, but the last message was not kept"
            )
        header = bucket.header.nbytes
        bucket.header.view(torch.uint8).copy_(data[:header])
        self.changed_bytes += delta.apply(data[header:], _elements(bucket, last)) * _itemsize(bucket)
        bucket.payload.copy_(last)

    def _encode(self, message: Message, bucket: Bucket) -> Tensor:
        """The bytes to send for the bucket."""
        if not message.relay and not bucket.failed():
            last = self._last(message, bucket)
            changes = None if last is None else delta.encode(_elements(bucket, bucket.payload), _elements(bucket, last))
            if changes is not None and changes.numel() < bucket.payload_bytes:
                bucket.delta = torch.cat([bucket.header.view(torch.uint8), changes])
            self._unsent[message.content] -= 1
            if not self._unsent[message.content]:
                self._keep(message, bucket)  # not before: all its receivers kept the same
        self._count(message, self._length(bucket))
        return bucket.words.view(torch.uint8) if bucket.delta is None else bucket.delta

    def _last(self, message: Message, bucket: Bucket) -> Tensor | None:
        """The message's payload in the last transfer; None where it was not kept or had another size."""
        last = self._last_messages.get(message.content)
        return last if last is not None and last.shape == bucket.payload.shape else None

    def _keep(self, message: Message, bucket: Bucket) -> None:
        last = self._last(message, bucket)
        if last is None:
            self._last_messages[message.content] = bucket.payload.clone()
        else:
            last.copy_(bucket.payload)

    def _length(self, bucket: Bucket) -> int:
        return bucket.payload_bytes if bucket.delta is None else bucket.delta.numel() - bucket.header.nbytes


def _elements(bucket: Bucket, words: Tensor) -> Tensor:
    """The payload as bits of its elements."""
    return words.view(torch.int16 if _itemsize(bucket) == 2 else torch.int32)


def _changed_bytes(bucket: Bucket, last: Tensor) -> int:
    differ = _elements(bucket, bucket.payload) != _elements(bucket, last)
    return int(torch.count_nonzero(differ)) * _itemsize(bucket)


def _itemsize(bucket: Bucket) -> int:
    smallest = min(STORED_BYTES[item.destination.dtype] for item in bucket.items)
    return min(4, max(2, smallest))  # of single bytes two count as one element


def make_wire(
    group: dist.ProcessGroup | None,
    schedule: Schedule,
    buffers: Buffers,
    last_messages: LastMessages | None,
    wait_span: WaitSpan | None,
) -> Wire:
    """The wire of one transfer: shared memory where the buffers have a channel, deltas where `last_messages` is given."""
    wait_span = wait_span or (lambda _: nullcontext())
    if last_messages is not None:
        assert buffers.channel is None, "deltas are made in private memory"
        return DeltaWire(group, last_messages, schedule, wait_span)
    return (
        SharedMemoryWire(buffers.channel, buffers, schedule, wait_span)
        if buffers.channel
        else PointToPoint(group, wait_span)
    )
