"""The order of a plan's messages: who sends which bucket to whom, in steps that cannot deadlock (no torch)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import lcm
from typing import NamedTuple

from aligner.reshard.plan.transfer_plan import Item, Plan, Stream, StreamKey

STAGED = 4
"""Bound on the messages a rank holds at once: one that is sent and one that comes in, of this step and of the next."""

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
    by: int


class Message(NamedTuple):
    """One bucket, sent from rank `by` to rank `to`."""

    label: Label
    by: int
    to: int
    key: StreamKey
    bucket: int
    """Number of the bucket within the stream."""
    relay: bool
    """Forwarded unchanged by a rank that received it."""

    @property
    def content(self) -> tuple[StreamKey, int]:
        """What is in it: the same for a bucket and its relays."""
        return self.key, self.bucket


class Step(NamedTuple):
    """What a rank sends and receives at the same time."""

    send: Message | None
    receive: Message | None


@dataclass(frozen=True)
class Schedule:
    """One rank's messages in order, and what they hold."""

    steps: tuple[Step, ...]
    buckets: dict[StreamKey, list[tuple[Item, ...]]]
    local: tuple[tuple[Item, ...], ...]

    def items(self, message: Message) -> tuple[Item, ...]:
        """What the message holds, in order."""
        return self.buckets[message.key][message.bucket]

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes this rank sends, relays included; over all ranks as many as their minimum."""
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
        sizes = {key: [sum(item.bytes for item in items) for items in cut] for key, cut in self.buckets.items()}
        return sum(sizes[message.key][message.bucket] for message in messages if message)


def packed_by(message: Message) -> int:
    """The rank that packed a message, which relays do not change."""
    return deal(*message.content)[0][0] if message.relay else message.by


def schedule_of(plan: Plan, staging_bytes: int) -> Schedule:
    """`make_schedule`, cached on the plan."""
    if staging_bytes not in plan.schedules:
        plan.schedules[staging_bytes] = make_schedule(plan, staging_bytes)
    return plan.schedules[staging_bytes]


def make_schedule(plan: Plan, staging_bytes: int) -> Schedule:
    """The steps of `plan.rank`, with messages so small that all it holds at once stays within `staging_bytes`.

    Every message has a label, and each rank works through its own messages in the order of the labels, at most one
    sent and one received in a step. Of all messages that are not done, the one with the lowest label holds up neither
    of its ends with anything lower, so both reach it: there is always one that can go, and no ring of ranks waits.
    """
    limit = max(1, staging_bytes // STAGED)
    buckets = {stream.key: cut(stream, limit) for stream in plan.streams}
    place = {rank: number for number, rank in enumerate(plan.ranks)}
    counts = {key: len(filled) for key, filled in buckets.items()}
    found = list(_direct(plan.rank, {key: count for key, count in counts.items() if not key.relayed}, place))
    for key, count in counts.items():
        if key.relayed:
            found += _relayed(plan.rank, key, count, _distance(place, key.holders[0], key.wanters[0]))
    found.sort()
    total = plan.local_bytes
    count = max(1, _fewest(total, limit))
    local = _filled(plan.local, [total * (number + 1) // count for number in range(count)], limit)
    return Schedule(tuple(_steps(plan.rank, found)), buckets, tuple(local))


def _distance(place: Mapping[int, int], by: int, to: int) -> int:
    return (place[to] - place[by]) % len(place)


def cut(stream: Stream, limit: int) -> list[tuple[Item, ...]]:
    """A stream's items, in order, in buckets of about equal size and at most `limit` bytes; equal at both ends.

    There are as many as deal out evenly among holders and wanting ranks, unless they would become too small. Only a
    single element larger than `limit` makes a larger bucket.
    """
    total, holders, wanters = stream.bytes, len(stream.key.holders), len(stream.key.wanters)
    small = max(1, min(limit // 2, _SMALL))
    fewest = _fewest(total, limit)
    count = max(fewest, total // small)
    for unit in (lcm(holders, wanters) if stream.key.relayed else holders, max(holders, wanters)):
        even = -(-fewest // unit) * unit
        if total >= even * small:
            count = even
            break
    return _filled(stream.items, [total * (number + 1) // count for number in range(count)], limit)


def _fewest(total: int, limit: int) -> int:
    """Buckets into which so many bytes are cut at least."""
    return max(-(-total // limit), min(_OVERLAPPING, total // _WORTHWHILE))


def _filled(items: Sequence[Item], ends: Sequence[int], limit: int) -> list[tuple[Item, ...]]:
    """Buckets that end at about the given positions in the stream of bytes, where slices of a tensor end."""
    filled: list[tuple[Item, ...]] = []
    left = list(reversed(items))
    done, sliver = 0, ends[-1] // len(ends) // 2
    while left:
        end = ends[min(bisect_right(ends, done + sliver), len(ends) - 1)]
        room = min(limit, end - done)
        bucket: list[Item] = []
        while left and room > 0:
            item = left.pop()
            if item.bytes > room:
                if bucket and _slice_bytes(item) > room:
                    left.append(item)
                    break
                item, *rest = _split(item, room)
                left += reversed(rest)
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


def _slice_bytes(item: Item) -> int:
    """Bytes of the thinnest slab that keeps the later dimensions whole."""
    return item.bytes // next((extent for extent in item.size if extent > 1), 1)


def _slab(item: Item, dim: int, start: int, count: int) -> Item:
    lo = (*item.lo[:dim], item.lo[dim] + start, *item.lo[dim + 1 :])
    return item.crop(lo, (*item.size[:dim], count, *item.size[dim + 1 :]))


def deal(key: StreamKey, bucket: int) -> list[tuple[int, int]]:
    """Who sends a bucket, from its own storages, to whom.

    In a stream that is relayed, one holder to one of those who want it, in turn. Else each holder in turn to the next of them.
    """
    holders, wanters = key.holders, key.wanters
    by = bucket + _turn(wanters[0], len(holders))
    if key.relayed:
        return [(holders[by % len(holders)], wanters[(bucket + _turn(holders[0], len(wanters))) % len(wanters)])]
    return [(holders[(by + number) % len(holders)], to) for number, to in enumerate(wanters)]


def _direct(rank: int, counts: Mapping[StreamKey, int], place: Mapping[int, int]) -> Iterator[Message]:
    """All buckets that go between two ranks, those of several streams in turn, one in each round."""
    pairs: dict[tuple[int, int], list[tuple[float, StreamKey, int]]] = {}
    for key, count in counts.items():
        for bucket in range(count):
            for by, to in deal(key, bucket):
                if rank in (by, to):
                    pairs.setdefault((by, to), []).append(((bucket + 0.5) / count, key, bucket))
    for (by, to), found in pairs.items():
        for round_, (_, key, bucket) in enumerate(sorted(found)):
            yield Message(Label(round_, _distance(place, by, to), False, (), 0, by), by, to, key, bucket, False)


def _relayed(rank: int, key: StreamKey, count: int, distance: int) -> Iterator[Message]:
    """In a round each wanting rank gets one bucket from a holder and passes it on to all the others.

    Rank i of them gets its bucket in tick i and exchanges with rank j, both ways, in tick i + j + 1. So the holder
    feeds one rank after the other while those before are exchanging already, each rank is busy for as many ticks as
    there are wanting ranks, from its own first tick on, and the next round or stream follows without a gap.
    """
    wanters, sends = key.wanters, rank in key.holders
    mine = None if sends else wanters.index(rank)
    for bucket in range(count):
        round_ = bucket // len(wanters)
        ((holder, relay),) = deal(key, bucket)
        first = wanters.index(relay)
        if rank in (holder, relay):
            yield Message(Label(round_, distance, True, key, first, holder), holder, relay, key, bucket, False)
        for other in range(len(wanters)) if rank == relay else () if mine is None else (mine,):
            if other != first:
                label = Label(round_, distance, True, key, first + other + 1, relay)
                yield Message(label, relay, wanters[other], key, bucket, True)


def _turn(first: int, count: int) -> int:
    """Where to start dealing among `count`: differs for neighbours and for ranks that are a multiple apart."""
    return (first + first // count) % count


def _steps(rank: int, messages: Sequence[Message]) -> Iterator[Step]:
    """Neighbours in order, at most one each way; an exchange (one tick) stays together, a relay follows its receipt."""
    step = Step(None, None)
    for _, tick in groupby(messages, key=lambda message: message.label[:-1]):
        both = list(tick)
        send = next((message for message in both if message.by == rank), None)
        receive = next((message for message in both if message.to == rank), None)
        assert len(both) == (send is not None) + (receive is not None), f"rank {rank} has {both} in one tick"
        follows = send and send.relay and step.receive and step.receive.content == send.content
        if (send and step.send) or (receive and step.receive) or follows:
            yield step
            step = Step(None, None)
        step = Step(send or step.send, receive or step.receive)
    if step.send or step.receive:
        yield step
