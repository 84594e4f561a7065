"""What every rank of a transfer would send and receive, for worlds of any size, without planning each rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.schedule import STAGED, cut, deal
from aligner.reshard.plan.transfer_plan import Plan, Stream, StreamKey, make_plan


@dataclass
class Load:
    """Bytes of one rank."""

    sent: int = 0
    """Sent from its own source storages."""
    relayed: int = 0
    """Received and passed on."""
    received: int = 0
    """Received, what it passes on included."""
    local: int = 0
    """Copied within the rank."""

    @property
    def out(self) -> int:
        """All that it sends."""
        return self.sent + self.relayed


@dataclass
class TrafficModel:
    """Bytes that each rank of a transfer sends and receives, and lower bounds on them."""

    loads: dict[int, Load]
    planned: dict[int, float] = field(default_factory=dict)
    """Planning seconds of each rank that was planned."""
    by_holders: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Bytes that some rank of each set must send, whatever the plan: only these hold them."""

    @property
    def least_heaviest(self) -> float:
        """Lower bound, in bytes, on what the busiest source rank sends under any plan: some set of ranks alone holds as much."""
        sets = {holders: set(holders) for holders in self.by_holders}
        return max(
            (
                sum(amount for other, amount in self.by_holders.items() if sets[other] <= whole) / len(whole)
                for whole in sets.values()
            ),
            default=0.0,
        )


def make_traffic_model(
    source: WeightLayout,
    destination: WeightLayout,
    names: Iterable[str],
    staging_bytes: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TrafficModel:
    """Plan one rank of each set of ranks that hold and want the same, and add up what its streams ask of all ranks.

    Every stream is seen so: who wants it is decided by what ranks hold and want, so it has one of the planned ranks.

    Args:
        names: all logical tensors.
        staging_bytes: as for `make_schedule`; it decides how streams are cut, and so how evenly they are dealt.
        progress: called with the number of ranks planned and to plan.
    """
    account = TrafficModel({rank: Load() for rank in sorted({*source.ranks, *destination.ranks})})
    streams: dict[StreamKey, Stream] = {}
    alike = _alike(source, destination, names)
    for number, ranks in enumerate(alike):
        progress(number, len(alike))
        started = time.perf_counter()
        plan = make_plan(ranks[0], source, destination)
        account.planned[ranks[0]] = time.perf_counter() - started
        streams |= {stream.key: stream for stream in plan.streams if ranks[0] in stream.key.wanters}
        _add_own(account, plan, ranks)
    for stream in streams.values():
        _add_stream(account, stream, staging_bytes // STAGED)
    return account


def _alike(source: WeightLayout, destination: WeightLayout, names: Iterable[str]) -> list[tuple[int, ...]]:
    """The destination's ranks in sets that appear in the same pieces of both sides."""
    members: dict[int, tuple[int, ...]] = {}
    for name in names:
        for side in (source, destination):
            members |= {id(ranks): ranks for _, ranks in side.holders(name)}
    sets: dict[int, list[int]] = {rank: [] for rank in destination.ranks}
    for number, ranks in enumerate(dict.fromkeys(members.values())):
        for rank in sets.keys() & set(ranks):
            sets[rank].append(number)
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, numbers in sets.items():
        found.setdefault(tuple(numbers), []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _add_own(account: TrafficModel, plan: Plan, ranks: Iterable[int]) -> None:
    minimum, local = plan.minimum_bytes, plan.local_bytes
    for rank in ranks:
        account.loads[rank].received, account.loads[rank].local = minimum, local


def _add_stream(account: TrafficModel, stream: Stream, limit: int) -> None:
    key, loads = stream.key, account.loads
    for bucket, items in enumerate(cut(stream, limit)):
        size = sum(item.bytes for item in items)
        for by, to in deal(key, bucket):
            loads[by].sent += size
            if key.relayed:
                loads[to].relayed += size * (len(key.wanters) - 1)
    times = 1 if key.relayed else len(key.wanters)
    account.by_holders[key.holders] = account.by_holders.get(key.holders, 0) + times * stream.bytes
