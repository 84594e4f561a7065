"""How buckets travel: whole, in memory that ranks share, or as what changed since the last transfer."""

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
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.reshard.plan.schedule import Message, Schedule, Step
from aligner.reshard.transfer.shared_memory import SharedMemoryChannel

LastMessages = dict[object, Tensor]
"""Message of a plan -> its payload in the last transfer: as much memory as a rank sends and receives."""

Waiting = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Entered around each wait for messages from and to these ranks."""


class Wire(Protocol):
    """Carries the messages of one transfer and counts their bytes, without headers."""

    sent_bytes: int
    relayed_bytes: int
    received_bytes: int
    changed_bytes: int
    """Bytes of received elements that differ from the last transfer's; all bytes where nothing was kept to compare with."""
    shared: bool
    """Messages are read where their sender wrote them, so no buffer is needed to receive one."""

    def room(self, words: int) -> Tensor | None:
        """Where to pack a message of `words` 64-bit words; None: in any buffer."""

    def post(self, step: Step, leaving: Bucket | None, arriving: Bucket | None) -> list[dist.Work]:
        """Start a step's send and receive."""

    def wait(self, step: Step, requests: Sequence[dist.Work], arriving: Bucket | None) -> Bucket | None:
        """Wait for a posted step to complete. Returns the bucket that came in."""

    def landed(self, message: Message, bucket: Bucket) -> None:
        """Make a whole bucket of what came in, which is complete. RuntimeError where that cannot be done."""


class PointToPoint:
    """Buckets as they are, by isend and irecv of the process group."""

    shared = False

    def __init__(self, group: dist.ProcessGroup | None, waiting: Waiting) -> None:
        self._group, self._waiting = group, waiting
        self.sent_bytes = self.relayed_bytes = self.received_bytes = self.changed_bytes = 0

    def room(self, words: int) -> Tensor | None:
        return None

    def post(self, step: Step, leaving: Bucket | None, arriving: Bucket | None) -> list[dist.Work]:
        posts = []
        if step.send and leaving:
            self._count(step.send, leaving.payload_bytes)
            posts += [self._sending(step.send, part) for part in leaving.parts]
        if step.receive and arriving:
            posts += [self._receiving(step.receive, part) for part in arriving.parts]
        return list(dist.batch_isend_irecv(posts))

    def wait(self, step: Step, requests: Sequence[dist.Work], arriving: Bucket | None) -> Bucket | None:
        with self._waiting([*([step.send.to] if step.send else []), *([step.receive.by] if step.receive else [])]):
            for request in requests:
                request.wait()
        return arriving

    def landed(self, message: Message, bucket: Bucket) -> None:
        self.received_bytes += bucket.payload_bytes
        self.changed_bytes += bucket.payload_bytes

    def _count(self, message: Message, amount: int) -> None:
        self.sent_bytes += amount
        self.relayed_bytes += amount if message.relay else 0

    def _sending(self, message: Message, data: Tensor) -> dist.P2POp:
        return dist.P2POp(dist.isend, data, message.to, self._group)

    def _receiving(self, message: Message, data: Tensor) -> dist.P2POp:
        return dist.P2POp(dist.irecv, data, message.by, self._group)


class SharedMemoryWire(PointToPoint):
    """Buckets in memory that sender and receiver both see: packed there, and read from there.

    What a rank passes on it copies out first, so that its sender never waits for a relay, and in again for each reader.
    So whoever waits for a message, or for room, waits for a step that comes before its own.
    """

    shared = True

    def __init__(self, channel: SharedMemoryChannel, buffers: Buffers, schedule: Schedule, waiting: Waiting) -> None:
        super().__init__(None, waiting)
        self._channel, self._buffers, self._schedule = channel, buffers, schedule

    def room(self, words: int) -> Tensor:
        spare = self._channel.room(words)
        if spare is not None:
            return spare
        with self._waiting(self._channel.readers):
            self._channel.wait_for_room()
        return self.room(words)

    def post(self, step: Step, leaving: Bucket | None, arriving: Bucket | None) -> list[dist.Work]:
        if step.send and leaving:
            self._count(step.send, leaving.payload_bytes)
            message = leaving.buffer
            if step.send.relay:
                message = self.room(leaving.whole.numel()).copy_(leaving.whole)
            self._channel.hand(step.send.to, message)
        return []

    def wait(self, step: Step, requests: Sequence[dist.Work], arriving: Bucket | None) -> Bucket | None:
        if step.receive is None:
            return None
        with self._waiting([step.receive.by]):
            message = self._channel.take(step.receive.by)
        items = self._schedule.items(step.receive)
        if message.numel() != self._buffers.layout(items).words:
            raise RuntimeError(
                f"reshard: rank {step.receive.by} sent a message of {message.nbytes} bytes where {items[0]} and "
                f"{len(items) - 1} more make {8 * self._buffers.layout(items).words}: the ranks' plans differ"
            )
        if arriving is None:
            return Bucket(items, self._buffers, message)
        arriving.whole.copy_(message)
        self._channel.back(message)
        return arriving


class DeltaWire(PointToPoint):
    """Buckets of one part, as their header and a delta where that is shorter, else whole; relays pass on what they got.

    Lengths are known only when a bucket is packed, so each travels in front of its message. The receiver makes the
    whole bucket of the delta and what it kept: checksums, write and proof are the same as ever. Staging grows by the
    delta that leaves and the one that comes in, each smaller than its bucket.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, kept: LastMessages, schedule: Schedule, waiting: Waiting
    ) -> None:
        super().__init__(group, waiting)
        self._kept = kept
        self._left = Counter(step.send.content for step in schedule.steps if step.send and not step.send.relay)

    def post(self, step: Step, leaving: Bucket | None, arriving: Bucket | None) -> list[dist.Work]:
        """In the one order of all messages: whoever waits for a length has sent all that others may wait for first."""
        requests: list[dist.Work] = []
        for message in sorted(message for message in step if message):
            if leaving and message is step.send:
                requests += self._send(message, leaving)
            elif arriving:
                requests += self._receive(message, arriving)
        return requests

    def _send(self, message: Message, bucket: Bucket) -> list[dist.Work]:
        out = self._out(message, bucket)
        told = torch.tensor([out.numel()], device=out.device)
        return [work for data in (told, out) for work in dist.batch_isend_irecv([self._sending(message, data)])]

    def _receive(self, message: Message, bucket: Bucket) -> list[dist.Work]:
        length = torch.zeros(1, dtype=torch.int64, device=bucket.words.device)
        for request in dist.batch_isend_irecv([self._receiving(message, length)]):
            request.wait()
        into = bucket.words.view(torch.uint8)
        if int(length) != into.numel():
            into = bucket.delta = into.new_empty(int(length))
        return list(dist.batch_isend_irecv([self._receiving(message, into)]))

    def landed(self, message: Message, bucket: Bucket) -> None:
        data, kept = bucket.delta, self._last(message, bucket)
        self.received_bytes += self._length(bucket)
        if data is None:
            self.changed_bytes += bucket.payload_bytes if kept is None else _changed_bytes(bucket, kept)
            self._keep(message, bucket)
            return
        if kept is None:
            raise RuntimeError(
                f"reshard: rank {message.by} sent changes of {bucket.items[0]}, of which nothing was kept"
            )
        header = bucket.header.nbytes
        bucket.header.view(torch.uint8).copy_(data[:header])
        self.changed_bytes += delta.decode(data[header:], _elements(bucket, kept)) * _itemsize(bucket)
        bucket.payload.copy_(kept)

    def _out(self, message: Message, bucket: Bucket) -> Tensor:
        """The bytes that stand for the bucket."""
        if not message.relay and not bucket.failed():
            kept = self._last(message, bucket)
            changes = None if kept is None else delta.encode(_elements(bucket, bucket.payload), _elements(bucket, kept))
            if changes is not None and changes.numel() < bucket.payload_bytes:
                bucket.delta = torch.cat([bucket.header.view(torch.uint8), changes])
            self._left[message.content] -= 1
            if not self._left[message.content]:
                self._keep(message, bucket)  # not before: all whom this rank sends it to kept the same
        self._count(message, self._length(bucket))
        return bucket.words.view(torch.uint8) if bucket.delta is None else bucket.delta

    def _last(self, message: Message, bucket: Bucket) -> Tensor | None:
        """What was kept of the message; None where that was no bucket of this size."""
        kept = self._kept.get(message.content)
        return kept if kept is not None and kept.shape == bucket.payload.shape else None

    def _keep(self, message: Message, bucket: Bucket) -> None:
        kept = self._last(message, bucket)
        if kept is None:
            self._kept[message.content] = bucket.payload.clone()
        else:
            kept.copy_(bucket.payload)

    def _length(self, bucket: Bucket) -> int:
        return bucket.payload_bytes if bucket.delta is None else bucket.delta.numel() - bucket.header.nbytes


def _elements(bucket: Bucket, words: Tensor) -> Tensor:
    """The payload as bits of its elements."""
    return words.view(torch.int16 if _itemsize(bucket) == 2 else torch.int32)


def _changed_bytes(bucket: Bucket, kept: Tensor) -> int:
    differ = _elements(bucket, bucket.payload) != _elements(bucket, kept)
    return int(torch.count_nonzero(differ)) * _itemsize(bucket)


def _itemsize(bucket: Bucket) -> int:
    return min(4, *(ELEMENT_BYTES[item.destination.dtype] for item in bucket.items))


def wire_of(
    group: dist.ProcessGroup | None,
    schedule: Schedule,
    buffers: Buffers,
    kept: LastMessages | None,
    waiting: Waiting | None,
) -> Wire:
    """The wire of one transfer: shared memory where the buffers have a channel, deltas where `kept` is given."""
    waiting = waiting or (lambda _: nullcontext())
    if kept is not None:
        assert buffers.channel is None, "what changed is found in private memory"
        return DeltaWire(group, kept, schedule, waiting)
    return (
        SharedMemoryWire(buffers.channel, buffers, schedule, waiting)
        if buffers.channel
        else PointToPoint(group, waiting)
    )
