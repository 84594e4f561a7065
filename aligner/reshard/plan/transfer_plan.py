"""The plan: who sends which region to whom, a pure function of the two layouts that each rank computes for itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from aligner.reshard.plan.layout import LazyHolders, WeightLayout, as_layout
from aligner.reshard.plan.region import Box, Layout, Piece, intersect
from aligner.reshard.plan.region_matching import Flow, Held, Missing, Ranks, flows, wanted

if TYPE_CHECKING:
    from aligner.reshard.plan.schedule import Schedule


class Item(NamedTuple):
    """One region to be copied, and where it is at both ends; both pieces are cropped to it."""

    name: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    source: Piece
    """On the sender its own piece, on the others that of one of the holders."""
    destination: Piece
    """On the receiver its own piece, on the sender that of one of the receivers, of the same dtype."""

    @property
    def bytes(self) -> int:
        """Bytes on the wire: counted in the destination's dtype, since the source casts before it sends."""
        return self.destination.bytes

    def crop(self, lo: tuple[int, ...], size: tuple[int, ...]) -> Item:
        return Item(self.name, lo, size, self.source.crop(lo, size), self.destination.crop(lo, size))

    def __str__(self) -> str:
        return f"{self.name}{Box(self.lo, self.size)}"


class StreamKey(NamedTuple):
    """What goes from the same holders to the same wanting ranks in one data type; both ends have the same items."""

    holders: Ranks
    wanters: Ranks
    dtype: str
    copy: int
    relayed: bool
    """Each byte is sent once, to one of the wanting ranks, and passed on among them."""


@dataclass(frozen=True)
class Stream:
    """The items of one key in canonical order: natural order of names, then of regions."""

    key: StreamKey
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True)
class Plan:
    """One rank's part of a transfer."""

    rank: int
    ranks: Ranks
    """The ranks of both ends, ascending."""
    local: tuple[Item, ...]
    """Regions this rank needs and already holds."""
    streams: tuple[Stream, ...]
    """What this rank helps to send, or receives: it is a holder or a wanting rank of each, never both."""
    schedules: dict[int, Schedule] = field(default_factory=dict, compare=False, repr=False)
    """Schedules made so far, by bytes of staging memory."""

    @property
    def minimum_bytes(self) -> int:
        """Bytes of this rank's destination regions that it does not hold itself at the source: the least that it can receive."""
        return sum(stream.bytes for stream in self.streams if self.rank in stream.key.wanters)

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank copies within itself."""
        return sum(item.bytes for item in self.local)


def make_plan(
    rank: int, source: WeightLayout | Mapping[int, Layout], destination: WeightLayout | Mapping[int, Layout]
) -> Plan:
    """`rank`'s part of the plan that fills every destination piece exactly once.

    A region that its own rank holds is copied there; what is missing enters each rank once. Where more ranks want a
    region than hold it, they pass it on to each other if the destination has more ranks than the source, whose links
    would else be the bottleneck; if not, each holder sends to several, which needs no waiting for a relay. Time is proportional to the
    pieces of `rank` itself: tensors are looked at one by one, and those with equal layouts are matched once.

    Raises:
        ValueError: a region that no source rank holds, or that has other dimensions there; on the ranks that want it or could
            have sent it.
    """
    source, destination = as_layout(source), as_layout(destination)
    names = {piece.name for piece in source.layout(rank)} | {piece.name for piece in destination.layout(rank)}
    matcher = _Matcher(rank, len(destination.ranks) > len(source.ranks))
    local: list[Item] = []
    streams: dict[StreamKey, list[Item]] = {}
    for name in sorted(names, key=natural):
        held, want = source.holders(name), destination.holders(name)
        for match in matcher.matches(name, held, want):
            lo, size = match.region
            taken, given = held[match.held][0], want[match.want][0]
            item = Item(name, lo, size, taken.crop(lo, size), given.crop(lo, size))
            (local if match.key is None else streams.setdefault(match.key, [])).append(item)
    return Plan(
        rank,
        tuple(sorted({*source.ranks, *destination.ranks})),
        tuple(local),
        tuple(Stream(key, tuple(items)) for key, items in streams.items()),
    )


def natural(name: str) -> str:
    """A sort key under which layer 2 comes before layer 10."""
    return _NUMBER.sub(lambda digits: digits[0].zfill(8), name)


_NUMBER = re.compile(r"\d+")
_Entries = Sequence[tuple[Piece, Ranks]]


class _Match(NamedTuple):
    """A region that concerns this rank: the pieces by their entries, and the stream, None for a local copy."""

    region: Box
    held: int
    want: int
    key: StreamKey | None


class _Matcher:
    """Matches source and destination of one tensor after the other for one rank; tensors with equal layouts only once."""

    def __init__(self, rank: int, few_sources: bool) -> None:
        self._rank, self._few_sources = rank, few_sources
        self._known: dict[object, list[_Match]] = {}
        self._numbers: dict[Ranks, int] = {}
        self._by_id: dict[int, int] = {}
        self._kept: list[Ranks] = []

    def matches(self, name: str, held: _Entries, want: _Entries) -> list[_Match]:
        """The regions of tensor `name` that concern this rank, in order of their place."""
        form = self._form(held), self._form(want)
        found = self._known.get(form)
        if found is None:
            found = self._known[form] = sorted(self._match(name, held, want), key=lambda match: match.region)
        return found

    def _form(self, entries: _Entries) -> object:
        """Equal for tensors of one layout that have the same boxes, dtypes and ranks."""
        if isinstance(entries, LazyHolders):
            return entries.form
        known, number = self._by_id.get, self._number
        return tuple(
            [(piece.lo, piece.size, piece.dtype, known(id(ranks)) or number(ranks)) for piece, ranks in entries]
        )

    def _number(self, ranks: Ranks) -> int:
        """Positive, equal for equal tuples; found by identity, since to hash hundreds of ranks for each piece is slow."""
        number = self._numbers.setdefault(ranks, len(self._numbers) + 1)
        self._by_id[id(ranks)] = number
        self._kept.append(ranks)  # so its id stays its own
        return number

    def _match(self, name: str, held: _Entries, want: _Entries) -> Iterator[_Match]:
        sources = [Held(piece.box, ranks, entry) for entry, (piece, ranks) in enumerate(held)]
        own = [one.box for one in sources if self._rank in one.ranks]
        for piece, ranks in want:
            _check_dimensions(piece, ranks[0], sources)
        boxes = {piece.box for piece, ranks in want if self._rank in ranks}
        boxes |= {piece.box for piece, _ in want if any(intersect(box, piece) for box in own)}
        for one in wanted([(piece.box, piece.dtype, ranks) for piece, ranks in want], boxes):
            for flow in flows(one, sources):
                if isinstance(flow, Missing):
                    raise _unheld(name, flow, want[flow.entry][0])
                match = self._mine(flow)
                if match:
                    yield match

    def _mine(self, flow: Flow) -> _Match | None:
        wants = self._rank in flow.entries
        if flow.kept:
            return _Match(flow.region, flow.form(self._rank), flow.entries[self._rank], None) if wants else None
        if not wants and self._rank not in flow.holders:
            return None
        relayed = self._few_sources and len(flow.wanters) > len(flow.holders)
        key = StreamKey(flow.holders, flow.wanters, flow.dtype, flow.copy, relayed)
        entry = flow.entries[self._rank if wants else flow.wanters[0]]
        return _Match(flow.region, flow.form(self._rank), entry, key)


def _check_dimensions(piece: Piece, rank: int, sources: Sequence[Held]) -> None:
    if not sources:
        raise ValueError(
            f"reshard: tensor {piece.name}, wanted by rank {rank} for {piece.storage}, is held by no source rank; "
            "build both sides from the same model.path"
        )
    dims = len(sources[0].box.lo)
    if len(piece.lo) != dims:
        raise ValueError(
            f"reshard: tensor {piece.name} has {dims} dimensions at the source and {len(piece.lo)} in "
            f"{piece.storage} of rank {rank}; build both sides from the same model.path"
        )


def _unheld(name: str, missing: Missing, piece: Piece) -> ValueError:
    return ValueError(
        f"reshard: region {missing.region} of tensor {name}, wanted by rank {missing.rank} for {piece.storage}, is "
        "held by no source rank; build both sides from the same model.path"
    )
