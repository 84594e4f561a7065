"""Traffic of a transfer: what every rank would send and receive, in worlds of any size, without planning each rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.schedule import STAGED, cut_into_buckets, first_hops
from aligner.reshard.plan.transfer_plan import Stream, StreamKey, TransferPlan, plan_transfer


@dataclass
class Load:
    """Bytes of one rank."""

    sent: int = 0
    """Sent from its own source storages."""
    relayed: int = 0
    """Received and relayed."""
    received: int = 0
    """Received, what it relays included."""
    local: int = 0
    """Copied within the rank."""

    @property
    def out(self) -> int:
        """All that it sends, relays included."""
        return self.sent + self.relayed


@dataclass
class TrafficModel:
    """Bytes that each rank of a transfer sends and receives, and lower bounds on them."""

    loads: dict[int, Load]
    planning_seconds: dict[int, float] = field(default_factory=dict)
    """Planning seconds of each rank that was planned."""
    bytes_by_holders: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Bytes that some rank of each set must send, whatever the plan: only these hold them."""

    @property
    def heaviest_lower_bound(self) -> float:
        """Lower bound, in bytes, on what the busiest source rank sends under any plan: some set of ranks alone holds as much."""
        sets = {holders: set(holders) for holders in self.bytes_by_holders}
        return max(
            (
                sum(amount for other, amount in self.bytes_by_holders.items() if sets[other] <= whole) / len(whole)
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

    That covers every stream: its receivers are whole sets of ranks that hold and want the same, so one is planned.

    Args:
        names: all logical tensors.
        staging_bytes: as for `make_schedule`; it decides how streams are cut, and so how evenly holders share the sending.
        progress: called with the number of ranks planned and to plan.
    """
    model = TrafficModel({rank: Load() for rank in sorted({*source.ranks, *destination.ranks})})
    streams: dict[StreamKey, Stream] = {}
    classes = _interchangeable_ranks(source, destination, names)
    for number, ranks in enumerate(classes):
        progress(number, len(classes))
        started = time.perf_counter()
        plan = plan_transfer(ranks[0], source, destination)
        model.planning_seconds[ranks[0]] = time.perf_counter() - started
        streams |= {stream.key: stream for stream in plan.streams if ranks[0] in stream.key.receivers}
        _add_receipts(model, plan, ranks)
    for stream in streams.values():
        _add_stream(model, stream, staging_bytes // STAGED)
    return model


def _interchangeable_ranks(
    source: WeightLayout, destination: WeightLayout, names: Iterable[str]
) -> list[tuple[int, ...]]:
    """The destination's ranks in classes that hold and want the same pieces."""
    members: dict[int, tuple[int, ...]] = {}
    for name in names:
        for layout in (source, destination):
            members |= {id(ranks): ranks for _, ranks in layout.holders(name)}
    sets: dict[int, list[int]] = {rank: [] for rank in destination.ranks}
    for number, ranks in enumerate(dict.fromkeys(members.values())):
        for rank in sets.keys() & set(ranks):
            sets[rank].append(number)
    classes: dict[tuple[int, ...], list[int]] = {}
    for rank, numbers in sets.items():
        classes.setdefault(tuple(numbers), []).append(rank)
    return [tuple(ranks) for ranks in classes.values()]


def _add_receipts(model: TrafficModel, plan: TransferPlan, ranks: Iterable[int]) -> None:
    minimum, local = plan.minimum_bytes, plan.local_bytes
    for rank in ranks:
        model.loads[rank].received, model.loads[rank].local = minimum, local


def _add_stream(model: TrafficModel, stream: Stream, limit: int) -> None:
    key, loads = stream.key, model.loads
    for bucket, items in enumerate(cut_into_buckets(stream, limit)):
        size = sum(item.bytes for item in items)
        for sender, receiver in first_hops(key, bucket):
            loads[sender].sent += size
            if key.relayed:
                loads[receiver].relayed += size * (len(key.receivers) - 1)
    copies = 1 if key.relayed else len(key.receivers)
    model.bytes_by_holders[key.holders] = model.bytes_by_holders.get(key.holders, 0) + copies * stream.bytes
