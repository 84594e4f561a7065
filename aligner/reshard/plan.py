"""The plan: who sends which region to whom, a pure function of the two sides' layouts (no torch, no communication)."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from aligner.reshard.region import ELEMENT_BYTES, Box, Layout, Piece, intersect, subtract


@dataclass(frozen=True)
class Item:
    """One region's journey; both pieces are cropped to it."""

    name: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    source: Piece
    destination: Piece

    @property
    def bytes(self) -> int:
        """Bytes on the wire: counted in the destination's dtype, since the source casts before it sends."""
        return self.destination.bytes

    def crop(self, lo: tuple[int, ...], size: tuple[int, ...]) -> Item:
        return Item(self.name, lo, size, self.source.crop(lo, size), self.destination.crop(lo, size))

    def __str__(self) -> str:
        return f"{self.name}{Box(self.lo, self.size)}"


@dataclass(frozen=True)
class Plan:
    """One rank's view of a plan. A pair's sender and receiver have the same items for each other, in the same order."""

    rank: int
    local: tuple[Item, ...]
    """Regions this rank needs and already holds."""
    sends: Mapping[int, tuple[Item, ...]]
    """Receiving rank -> what this rank sends it."""
    receives: Mapping[int, tuple[Item, ...]]
    """Sending rank -> what this rank receives from it."""
    minimum_bytes: int
    """Bytes of this rank's destination regions that its own source layout does not hold: nothing less can enter it."""
    streams: int
    """Most peers that any one rank of the plan sends to or receives from (equal on every rank)."""

    @property
    def moved_bytes(self) -> int:
        """Bytes this rank sends; over all ranks their sum equals the sum of `minimum_bytes`."""
        return sum(item.bytes for items in self.sends.values() for item in items)

    @property
    def received_bytes(self) -> int:
        return sum(item.bytes for items in self.receives.values() for item in items)

    @property
    def local_bytes(self) -> int:
        return sum(item.bytes for item in self.local)


def make_plan(rank: int, sources: Mapping[int, Layout], destinations: Mapping[int, Layout]) -> Plan:
    """`rank`'s view of the plan that fills every destination piece exactly once.

    A region that its own rank holds is copied there; the rest comes from the holders, who share the bytes evenly.
    Items stand in the order of the destination's storages, so that its modules complete one after the other.
    Cost: near-linear in the number of pieces (pieces are indexed by name, replicas of a box count once).

    Raises ValueError where a destination wants what no source holds; equally on every rank.
    """
    local: list[Item] = []
    sends: dict[int, list[Item]] = {}
    receives: dict[int, list[Item]] = {}
    peers: dict[tuple[str, int], set[int]] = {}
    minimum = 0
    for journey in _journeys(sources, destinations):
        by, to = journey.by, journey.to
        if by != to:
            peers.setdefault(("to", to), set()).add(by)
            peers.setdefault(("by", by), set()).add(to)
        if rank == by == to:
            local.append(journey.item())
        elif rank == by:
            sends.setdefault(to, []).append(journey.item())
        elif rank == to:
            receives.setdefault(by, []).append(journey.item())
            minimum += journey.region.elements * ELEMENT_BYTES[journey.piece.dtype]
    return Plan(
        rank=rank,
        local=tuple(local),
        sends={to: tuple(items) for to, items in sends.items()},
        receives={by: tuple(items) for by, items in receives.items()},
        minimum_bytes=minimum,
        streams=max((len(others) for others in peers.values()), default=0),
    )


def buckets(items: Iterable[Item], limit: int) -> list[tuple[Item, ...]]:
    """`items`, in order, in buckets of at most `limit` bytes; larger items are split along their first dimensions.

    Only a single element larger than `limit` makes a larger bucket. Both ends of a pair get the same cut.
    """
    filled: list[tuple[Item, ...]] = []
    bucket: list[Item] = []
    room = limit
    for whole in items:
        for item in _split(whole, limit):
            if item.bytes > room and bucket:
                filled.append(tuple(bucket))
                bucket, room = [], limit
            bucket.append(item)
            room -= item.bytes
    return [*filled, tuple(bucket)] if bucket else filled


def _split(item: Item, limit: int) -> Iterator[Item]:
    dim = next((dim for dim, extent in enumerate(item.size) if extent > 1), None)
    if item.bytes <= limit or dim is None:
        yield item
        return
    # Thicker than one slice where slices fit, else slice by slice, each split along the next dimension.
    step = max(1, limit * item.size[dim] // item.bytes)
    for start in range(0, item.size[dim], step):
        lo = (*item.lo[:dim], item.lo[dim] + start, *item.lo[dim + 1 :])
        extent = min(step, item.size[dim] - start)
        yield from _split(item.crop(lo, (*item.size[:dim], extent, *item.size[dim + 1 :])), limit)


@dataclass
class _Holders:
    """The ranks that hold one and the same box of a tensor."""

    box: Box
    pieces: dict[int, Piece] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()


class _Cover:
    """Disjoint regions that make up a box, each with its holders, and what nobody holds."""

    def __init__(self, box: Box, near: Iterable[_Holders]) -> None:
        self.regions: list[tuple[Box, _Holders]] = []
        self.missing = [box] if box.elements else []
        for holders in near:
            left: list[Box] = []
            for part in self.missing:
                region = intersect(part, holders.box)
                if region is None:
                    left.append(part)
                    continue
                self.regions.append((region, holders))
                left.extend(subtract(part, region))
            self.missing = left
            if not left:
                return


class _Boxes:
    """The distinct boxes in which one tensor is held, in order of their first row, searchable by row."""

    def __init__(self) -> None:
        self._holders: dict[Box, _Holders] = {}
        self._sorted: list[_Holders] = []
        self._starts: list[int] = []
        self._tallest = 0
        self._strangers: dict[Box, _Cover] = {}

    def add(self, rank: int, piece: Piece) -> None:
        self._holders.setdefault(piece.box, _Holders(piece.box)).pieces.setdefault(rank, piece)

    def close(self) -> None:
        self._sorted = [self._holders[box] for box in sorted(self._holders)]
        for holders in self._sorted:
            holders.ranks = tuple(sorted(holders.pieces))
        self._starts = [holders.box.lo[0] if holders.box.lo else 0 for holders in self._sorted]
        self._tallest = max(holders.box.size[0] if holders.box.size else 1 for holders in self._sorted)

    def cover(self, to: int, box: Box) -> _Cover:
        """`box` as regions for rank `to`: what `to` holds itself comes first, from itself."""
        near = self._near(box)
        if any(to in holders.pieces for holders in near):
            return _Cover(box, sorted(near, key=lambda holders: to not in holders.pieces))
        # Replicas on other ranks ask for the same boxes over and over.
        cover = self._strangers.get(box)
        if cover is None:
            cover = self._strangers[box] = _Cover(box, near)
        return cover

    def _near(self, box: Box) -> list[_Holders]:
        """Those whose rows may overlap the rows of `box`."""
        low, rows = (box.lo[0], box.size[0]) if box.lo else (0, 1)
        first = bisect_right(self._starts, low - self._tallest)
        return self._sorted[first : bisect_left(self._starts, low + rows)]

    @property
    def dims(self) -> int:
        return len(self._sorted[0].box.lo)


@dataclass(frozen=True)
class _Journey:
    """Region `region` of destination piece `piece` goes from rank `by` to rank `to` (equal: it is there already)."""

    by: int
    to: int
    region: Box
    holders: _Holders
    piece: Piece

    def item(self) -> Item:
        source = self.holders.pieces[self.by].crop(*self.region)
        return Item(self.piece.name, *self.region, source, self.piece.crop(*self.region))


class _Shares:
    """Deals out regions among replicas: the next one goes to the holder that has sent least for its set of replicas."""

    def __init__(self) -> None:
        self._heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def next_holder(self, holders: _Holders, amount: int) -> int:
        heap = self._heaps.get(holders.ranks)
        if heap is None:
            heap = self._heaps[holders.ranks] = [(0, rank) for rank in holders.ranks]
        sent, rank = heap[0]
        heapq.heapreplace(heap, (sent + amount, rank))
        return rank


def _journeys(sources: Mapping[int, Layout], destinations: Mapping[int, Layout]) -> Iterator[_Journey]:
    """Every journey of every rank, in the same order whoever asks: shares depend on what was dealt before."""
    held = _index(sources)
    shares = _Shares()
    for to in sorted(destinations):
        for piece in _by_storage(destinations[to]):
            for region, holders in _regions(to, piece, held.get(piece.name)):
                by = to if to in holders.pieces else shares.next_holder(holders, region.elements)
                yield _Journey(by, to, region, holders, piece)


def _index(sources: Mapping[int, Layout]) -> dict[str, _Boxes]:
    held: dict[str, _Boxes] = {}
    for rank in sorted(sources):
        for piece in sources[rank]:
            held.setdefault(piece.name, _Boxes()).add(rank, piece)
    for boxes in held.values():
        boxes.close()
    return held


def _by_storage(layout: Layout) -> Iterator[Piece]:
    """A layout's pieces, one storage after the other, storages in order of first appearance."""
    storages: dict[str, list[Piece]] = {}
    for piece in layout:
        storages.setdefault(piece.storage, []).append(piece)
    for pieces in storages.values():
        yield from pieces


def _regions(to: int, piece: Piece, boxes: _Boxes | None) -> list[tuple[Box, _Holders]]:
    """The regions that make up destination piece `piece` of rank `to`; ValueError where the sources lack any."""
    if boxes is None:
        raise ValueError(
            f"reshard: tensor {piece.name}, wanted by rank {to} for {piece.storage}, is held by no source rank; "
            "build both sides from the same model.path"
        )
    if len(piece.lo) != boxes.dims:
        raise ValueError(
            f"reshard: tensor {piece.name} has {boxes.dims} dimensions at the source and {len(piece.lo)} in "
            f"{piece.storage} of rank {to}; build both sides from the same model.path"
        )
    cover = boxes.cover(to, piece.box)
    if cover.missing:
        raise ValueError(
            f"reshard: region {cover.missing[0]} of tensor {piece.name}, wanted by rank {to} for {piece.storage}, is "
            "held by no source rank; build both sides from the same model.path"
        )
    return cover.regions
