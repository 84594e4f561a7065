"""The plan: who sends which region to whom, a pure function of the two layouts that each rank computes for itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aligner.reshard.plan.layout import LazyHolders, WeightLayout, as_layout
from aligner.reshard.plan.region import Box, Layout, Piece, intersect
from aligner.reshard.plan.region_matching import Flow, HeldBox, MissingRegion, Ranks, flows, wanted_boxes


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
    """What goes from the same holders to the same receivers in one data type; both ends have the same items."""

    holders: Ranks
    receivers: Ranks
    dtype: str
    copy: int
    relayed: bool
    """Each byte is sent once, to one of the receivers, and relayed among them."""


@dataclass(frozen=True)
class Stream:
    """The items of one key in canonical order: natural order of names, then of regions."""

    key: StreamKey
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True)
class TransferPlan:
    """One rank's part of a transfer."""

    rank: int
    ranks: Ranks
    """The ranks of both ends, ascending."""
    local: tuple[Item, ...]
    """Regions this rank needs and already holds."""
    streams: tuple[Stream, ...]
    """What this rank helps to send, or receives: it is a holder or a receiver of each, never both."""

    @property
    def minimum_bytes(self) -> int:
        """Bytes of this rank's destination regions that it does not hold itself at the source: the least that it can receive."""
        return sum(stream.bytes for stream in self.streams if self.rank in stream.key.receivers)

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank copies within itself."""
        return sum(item.bytes for item in self.local)


def plan_transfer(
    rank: int, source: WeightLayout | Mapping[int, Layout], destination: WeightLayout | Mapping[int, Layout]
) -> TransferPlan:
    """`rank`'s part of the plan that fills every destination piece exactly once.

    A region that its own rank holds is copied there; what is missing enters each rank once. Where more ranks want a
    region than hold it, they relay it to each other if the destination has more ranks than the source, whose links
    would else be the bottleneck; if not, each holder sends to several, which needs no waiting for a relay. Time is
    proportional to the pieces of `rank` itself: each tensor is matched by itself, those with equal layouts only once.

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
        held, wanted = source.holders(name), destination.holders(name)
        for match in matcher.matches(name, held, wanted):
            lo, size = match.region
            read, written = held[match.held][0], wanted[match.wanted][0]
            item = Item(name, lo, size, read.crop(lo, size), written.crop(lo, size))
            (local if match.key is None else streams.setdefault(match.key, [])).append(item)
    return TransferPlan(
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
    wanted: int
    key: StreamKey | None


class _Matcher:
    """Matches source and destination of one tensor after the other for one rank; tensors with equal layouts only once."""

    def __init__(self, rank: int, few_sources: bool) -> None:
        self._rank, self._few_sources = rank, few_sources
        self._matches: dict[object, list[_Match]] = {}
        self._numbers: dict[Ranks, int] = {}
        self._number_by_id: dict[int, int] = {}
        self._numbered: list[Ranks] = []

    def matches(self, name: str, held: _Entries, wanted: _Entries) -> list[_Match]:
        """The regions of tensor `name` that concern this rank, in order of their place."""
        form = self._form(held), self._form(wanted)
        matches = self._matches.get(form)
        if matches is None:
            matches = self._matches[form] = sorted(self._match(name, held, wanted), key=lambda match: match.region)
        return matches

    def _form(self, entries: _Entries) -> object:
        """Equal for tensors of one layout that have the same boxes, dtypes and ranks."""
        if isinstance(entries, LazyHolders):
            return entries.form
        cached, number = self._number_by_id.get, self._number
        return tuple(
            [(piece.lo, piece.size, piece.dtype, cached(id(ranks)) or number(ranks)) for piece, ranks in entries]
        )

    def _number(self, ranks: Ranks) -> int:
        """Positive, equal for equal tuples; found by identity, since to hash hundreds of ranks for each piece is slow."""
        number = self._numbers.setdefault(ranks, len(self._numbers) + 1)
        self._number_by_id[id(ranks)] = number
        self._numbered.append(ranks)  # so its id stays its own
        return number

    def _match(self, name: str, held: _Entries, wanted: _Entries) -> Iterator[_Match]:
        sources = [HeldBox(piece.box, ranks, entry) for entry, (piece, ranks) in enumerate(held)]
        own = [held_box.box for held_box in sources if self._rank in held_box.ranks]
        for piece, ranks in wanted:
            _check_dimensions(piece, ranks[0], sources)
        boxes = {piece.box for piece, ranks in wanted if self._rank in ranks}
        boxes |= {piece.box for piece, _ in wanted if any(intersect(box, piece) for box in own)}
        for wanted_box in wanted_boxes([(piece.box, piece.dtype, ranks) for piece, ranks in wanted], boxes):
            for flow in flows(wanted_box, sources):
                if isinstance(flow, MissingRegion):
                    raise _missing(name, flow, wanted[flow.entry][0])
                match = self._of_rank(flow)
                if match:
                    yield match

    def _of_rank(self, flow: Flow) -> _Match | None:
        wants = self._rank in flow.entries
        if flow.local:
            return _Match(flow.region, flow.source_entry(self._rank), flow.entries[self._rank], None) if wants else None
        if not wants and self._rank not in flow.holders:
            return None
        relayed = self._few_sources and len(flow.receivers) > len(flow.holders)
        key = StreamKey(flow.holders, flow.receivers, flow.dtype, flow.copy, relayed)
        entry = flow.entries[self._rank if wants else flow.receivers[0]]
        return _Match(flow.region, flow.source_entry(self._rank), entry, key)


def _check_dimensions(piece: Piece, rank: int, sources: Sequence[HeldBox]) -> None:
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


def _missing(name: str, missing: MissingRegion, piece: Piece) -> ValueError:
    return ValueError(
        f"reshard: region {missing.region} of tensor {name}, wanted by rank {missing.rank} for {piece.storage}, is "
        "held by no source rank; build both sides from the same model.path"
    )
