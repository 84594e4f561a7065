"""The order of a plan's messages: who sends which bucket to whom, in steps that cannot deadlock (no torch)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import lcm
from typing import NamedTuple

from aligner.reshard.plan.transfer_plan import Item, Stream, StreamKey, TransferPlan

STAGED = 4
"""Bound on the messages a rank holds at once: one sent and one received, of this step and of the next."""

_SMALL = 64 << 10
"""Bytes below which a message is not cut only to spread the load: its start would cost more than its bytes."""

_OVERLAPPING, _WORTHWHILE = 4, 1 << 20
"""Messages of a stream, if they have this many bytes: while one travels, the next is packed and the last one written."""


class Label(NamedTuple):
    """A message's place in the one order that all ranks follow; no two messages are equal.

    Rounds come first, so that everything moves forward together. Within a round a direct message stands at the distance
    between its ends, so that every rank can send one and receive one at each distance, and none waits for a third.
    A stream that is relayed stands at the distance between its first ranks, its own relays together.
    """

    round: int
    distance: int
    relayed: bool
    stream: StreamKey | tuple[()]
    """Of a relayed message."""
    tick: int
    sender: int


Content = tuple[StreamKey, int]
"""A stream, and the number of a bucket within it."""


class Message(NamedTuple):
    """One bucket, sent from rank `sender` to rank `receiver`."""

    label: Label
    sender: int
    receiver: int
    key: StreamKey
    bucket: int
    """Number of the bucket within the stream."""
    relay: bool
    """Forwarded unchanged by a rank that received it."""

    @property
    def content(self) -> Content:
        """What is in it: the same for a bucket and its relays."""
        return self.key, self.bucket


class ScheduleStep(NamedTuple):
    """The messages that a rank sends and receives at the same time."""

    send: Message | None
    receive: Message | None


@dataclass(frozen=True)
class Schedule:
    """One rank's messages in order, and their items."""

    steps: tuple[ScheduleStep, ...]
    buckets: dict[StreamKey, list[tuple[Item, ...]]]
    """The items of each bucket of a stream."""
    local: tuple[tuple[Item, ...], ...]
    """Items to copy within the rank, in portions that are spread over the steps."""
    beside: Mapping[Content, Mapping[str, tuple[Item, ...]]] = field(default_factory=dict)
    """Content of a received message -> tensor -> items of this tensor to copy within the rank after those of the message."""

    def items(self, message: Message) -> tuple[Item, ...]:
        """What the message holds, in order."""
        return self.buckets[message.key][message.bucket]

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes this rank sends, relays included; summed over all ranks, the sum of their `minimum_bytes`."""
        return self._bytes(step.send for step in self.steps)

    @cached_property
    def relayed_bytes(self) -> int:
        """Of these, bytes that it has received and forwards."""
        return self._bytes(step.send if step.send and step.send.relay else None for step in self.steps)

    @cached_property
    def received_bytes(self) -> int:
        """Bytes this rank receives."""
        return self._bytes(step.receive for step in self.steps)

    def _bytes(self, messages: Iterable[Message | None]) -> int:
        sizes = {key: [sum(item.bytes for item in items) for items in buckets] for key, buckets in self.buckets.items()}
        return sum(sizes[message.key][message.bucket] for message in messages if message)


def origin_rank(message: Message) -> int:
    """The rank that packed a message, which relays do not change."""
    return first_hops(*message.content)[0][0] if message.relay else message.sender


def make_schedule(plan: TransferPlan, staging_bytes: int, beside: bool = False) -> Schedule:
    """The steps of `plan.rank`, with messages so small that all it holds at once stays within `staging_bytes`.

    Every message has a label, and each rank works through its own messages in the order of the labels, at most one
    sent and one received in a step. Of all messages that are not done, the one with the lowest label holds up neither
    of its ends with anything lower, so both reach it: there is always one that can go, and no ring of ranks waits.

    Args:
        beside: a rank copies its own part of a tensor when it receives the rest, so that both are in the cache when the tensor
            is complete. Otherwise copies are spread evenly, to be made while messages travel.
    """
    limit = max(1, staging_bytes // STAGED)
    buckets = {stream.key: cut_into_buckets(stream, limit) for stream in plan.streams}
    position = {rank: number for number, rank in enumerate(plan.ranks)}
    counts = {key: len(filled) for key, filled in buckets.items()}
    messages = list(_direct(plan.rank, {key: count for key, count in counts.items() if not key.relayed}, position))
    for key, count in counts.items():
        if key.relayed:
            messages += _relayed(plan.rank, key, count, _distance(position, key.holders[0], key.receivers[0]))
    messages.sort()
    contents: dict[str, list[Content]] = {}
    for message in messages if beside else ():
        if message.receiver == plan.rank:
            for name in dict.fromkeys(item.name for item in buckets[message.key][message.bucket]):
                contents.setdefault(name, []).append(message.content)
    spread = [item for item in plan.local if item.name not in contents]
    return Schedule(
        tuple(_steps(plan.rank, messages)),
        buckets,
        tuple(_portions(spread, limit)),
        _assign([item for item in plan.local if item.name in contents], contents, limit),
    )


def _portions(items: Sequence[Item], limit: int) -> list[tuple[Item, ...]]:
    total = sum(item.bytes for item in items)
    count = max(1, _min_buckets(total, limit))
    return _fill_buckets(items, [total * (number + 1) // count for number in range(count)], limit)


def _assign(
    local: Sequence[Item], contents: Mapping[str, Sequence[Content]], limit: int
) -> dict[Content, dict[str, tuple[Item, ...]]]:
    """What is copied beside each message: of a tensor in several messages about as much beside each."""
    items_by_name: dict[str, list[Item]] = {}
    for item in (item for portion in _portions(local, limit) for item in portion):
        items_by_name.setdefault(item.name, []).append(item)
    beside: dict[Content, dict[str, tuple[Item, ...]]] = {}
    for name, items in items_by_name.items():
        messages = contents[name]
        for number, content in enumerate(messages):
            share = items[len(items) * number // len(messages) : len(items) * (number + 1) // len(messages)]
            if share:
                beside.setdefault(content, {})[name] = tuple(share)
    return beside


def _distance(position: Mapping[int, int], sender: int, receiver: int) -> int:
    return (position[receiver] - position[sender]) % len(position)


def cut_into_buckets(stream: Stream, limit: int) -> list[tuple[Item, ...]]:
    """A stream's items, in order, in buckets of about equal size and at most `limit` bytes; equal at both ends.

    Their number is a multiple of the number of holders and of receivers, unless they would become too small. Only a
    single element larger than `limit` makes a larger bucket.
    """
    total, holders, receivers = stream.bytes, len(stream.key.holders), len(stream.key.receivers)
    small = max(1, min(limit // 2, _SMALL))
    fewest = _min_buckets(total, limit)
    count = max(fewest, total // small)
    for unit in (lcm(holders, receivers) if stream.key.relayed else holders, max(holders, receivers)):
        even = -(-fewest // unit) * unit
        if total >= even * small:
            count = even
            break
    return _fill_buckets(stream.items, [total * (number + 1) // count for number in range(count)], limit)


def _min_buckets(total: int, limit: int) -> int:
    """Buckets into which so many bytes are cut at least."""
    return max(-(-total // limit), min(_OVERLAPPING, total // _WORTHWHILE))


def _fill_buckets(items: Sequence[Item], ends: Sequence[int], limit: int) -> list[tuple[Item, ...]]:
    """Buckets that end at about the given positions in the stream of bytes, where slices of a tensor end."""
    filled: list[tuple[Item, ...]] = []
    remaining = list(reversed(items))
    done, sliver = 0, ends[-1] // len(ends) // 2
    while remaining:
        end = ends[min(bisect_right(ends, done + sliver), len(ends) - 1)]
        room = min(limit, end - done)
        bucket: list[Item] = []
        while remaining and room > 0:
            item = remaining.pop()
            if item.bytes > room:
                if bucket and _slab_bytes(item) > room:
                    remaining.append(item)
                    break
                item, *rest = _split(item, room)
                remaining += reversed(rest)
            bucket.append(item)
            room -= item.bytes
            done += item.bytes
        filled.append(tuple(bucket))
    return filled


def _split(item: Item, room: int) -> list[Item]:
    """An item as disjoint items in order, the first one as large as fits into `room` bytes, or a single element."""
    dim = next((dim for dim, extent in enumerate(item.size) if extent > 1), None)
    if dim is None:
        return [item]
    extent = item.size[dim]
    count = min(max(1, room * extent // item.bytes), extent - 1)
    first, rest = _slab(item, dim, 0, count), _slab(item, dim, count, extent - count)
    return [*(_split(first, room) if first.bytes > room else [first]), rest]


def _slab_bytes(item: Item) -> int:
    """Bytes of the thinnest slab that keeps the later dimensions whole."""
    return item.bytes // next((extent for extent in item.size if extent > 1), 1)


def _slab(item: Item, dim: int, start: int, count: int) -> Item:
    lo = (*item.lo[:dim], item.lo[dim] + start, *item.lo[dim + 1 :])
    return item.crop(lo, (*item.size[:dim], count, *item.size[dim + 1 :]))


def first_hops(key: StreamKey, bucket: int) -> list[tuple[int, int]]:
    """(sender, receiver) of each message of a bucket that a holder sends from its own storages.

    In a stream that is relayed, one holder to one receiver, both round-robin. Else one to each receiver, the holders
    round-robin.
    """
    holders, receivers = key.holders, key.receivers
    first = bucket + _offset(receivers[0], len(holders))
    if key.relayed:
        relay = receivers[(bucket + _offset(holders[0], len(receivers))) % len(receivers)]
        return [(holders[first % len(holders)], relay)]
    return [(holders[(first + number) % len(holders)], receiver) for number, receiver in enumerate(receivers)]


def _direct(rank: int, counts: Mapping[StreamKey, int], position: Mapping[int, int]) -> Iterator[Message]:
    """All buckets that go between two ranks, those of several streams in turn, one in each round."""
    pairs: dict[tuple[int, int], list[tuple[float, StreamKey, int]]] = {}
    for key, count in counts.items():
        for bucket in range(count):
            for ends in first_hops(key, bucket):
                if rank in ends:
                    pairs.setdefault(ends, []).append(((bucket + 0.5) / count, key, bucket))
    for (sender, receiver), buckets in pairs.items():
        distance = _distance(position, sender, receiver)
        for round_, (_, key, bucket) in enumerate(sorted(buckets)):
            yield Message(Label(round_, distance, False, (), 0, sender), sender, receiver, key, bucket, False)


def _relayed(rank: int, key: StreamKey, count: int, distance: int) -> Iterator[Message]:
    """In a round each receiver gets one bucket from a holder and relays it to all the others.

    Receiver i gets its bucket in tick i and exchanges with receiver j, both ways, in tick i + j + 1. So the holder
    feeds one receiver after the other while those before are exchanging already, each receiver is busy for as many
    ticks as there are receivers, from its own first tick on, and the next round or stream follows without a gap.
    """
    receivers, sends = key.receivers, rank in key.holders
    own = None if sends else receivers.index(rank)
    for bucket in range(count):
        round_ = bucket // len(receivers)
        ((holder, relay),) = first_hops(key, bucket)
        first = receivers.index(relay)
        if rank in (holder, relay):
            yield Message(Label(round_, distance, True, key, first, holder), holder, relay, key, bucket, False)
        for other in range(len(receivers)) if rank == relay else () if own is None else (own,):
            if other != first:
                label = Label(round_, distance, True, key, first + other + 1, relay)
                yield Message(label, relay, receivers[other], key, bucket, True)


def _offset(first: int, count: int) -> int:
    """Where round-robin among `count` starts: differs for neighbours and for ranks that are a multiple apart."""
    return (first + first // count) % count


def _steps(rank: int, messages: Sequence[Message]) -> Iterator[ScheduleStep]:
    """Messages in order, two neighbours in one step where one is sent and one received.

    An exchange (one tick) stays together; a relayed bucket is sent in a later step than it was received in.
    """
    step = ScheduleStep(None, None)
    for _, of_tick in groupby(messages, key=lambda message: message.label[:-1]):
        tick = list(of_tick)
        send = next((message for message in tick if message.sender == rank), None)
        receive = next((message for message in tick if message.receiver == rank), None)
        assert len(tick) == (send is not None) + (receive is not None), f"rank {rank} has {tick} in one tick"
        relays = send and send.relay and step.receive and step.receive.content == send.content
        if (send and step.send) or (receive and step.receive) or relays:
            yield step
            step = ScheduleStep(None, None)
        step = ScheduleStep(send or step.send, receive or step.receive)
    if step.send or step.receive:
        yield step
