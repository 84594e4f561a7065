"""Which regions of a tensor fill the boxes that destination ranks want, and which ranks could send each (pure, no torch)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aligner.reshard.plan.region import Box, intersect, subtract

Ranks = tuple[int, ...]


class HeldBox(NamedTuple):
    """A box that some ranks hold in one form; `entry` is its index in the source's `holders`."""

    box: Box
    ranks: Ranks
    entry: int


class WantedBox(NamedTuple):
    """A box that some ranks want in one data type."""

    box: Box
    dtype: str
    copy: int
    """Counts where one rank wants the same box several times."""
    entries: dict[int, int]
    """Rank -> index in the destination's `holders` of the form in which it wants the box."""


@dataclass(frozen=True)
class Flow:
    """One region that some ranks hold and others want."""

    region: Box
    dtype: str
    copy: int
    holders: Ranks
    """Every rank that could send the region; meaningless where it is `local`."""
    held_boxes: tuple[HeldBox, ...]
    """The boxes that contain the region."""
    receivers: Ranks
    """The ranks that want it."""
    entries: dict[int, int]
    """Of `WantedBox`, for the receivers."""
    local: bool
    """The receivers hold the region themselves."""

    def source_entry(self, rank: int) -> int:
        """The source's entry in which `rank` holds the region, the first one for a rank that does not."""
        return next((held.entry for held in self.held_boxes if rank in held.ranks), self.held_boxes[0].entry)


class MissingRegion(NamedTuple):
    """A region that nobody holds, and a rank that wants it."""

    region: Box
    rank: int
    entry: int


def wanted_boxes(entries: Sequence[tuple[Box, str, Ranks]], boxes: Container[Box]) -> list[WantedBox]:
    """The distinct (box, dtype) of a tensor with the ranks that want them, for these boxes; equal on every rank."""
    numbers: dict[tuple[Box, str], list[int]] = {}
    for entry, (box, dtype, _) in enumerate(entries):
        if box in boxes:
            numbers.setdefault((box, dtype), []).append(entry)
    wanted: list[WantedBox] = []
    for (box, dtype), same in sorted(numbers.items()):
        copies: list[dict[int, int]] = []
        for entry in same:
            for rank in entries[entry][2]:
                of_rank = next((copy for copy in copies if rank not in copy), None)
                if of_rank is None:
                    of_rank = {}
                    copies.append(of_rank)
                of_rank[rank] = entry
        wanted += [WantedBox(box, dtype, number, of_rank) for number, of_rank in enumerate(copies)]
    return wanted


def flows(wanted: WantedBox, held: Sequence[HeldBox]) -> Iterator[Flow | MissingRegion]:
    """`wanted` as regions, each with all ranks that want just it and do not hold it.

    For ranks that hold the same boxes the regions are disjoint and make up the box; what a rank holds it copies locally.
    """
    overlapping = [candidate for candidate in held if intersect(candidate.box, wanted.box)]
    receivers: dict[tuple[Box, bool], list[int]] = {}
    for ranks, own in _ranks_by_own_boxes(wanted, overlapping):
        boxes = sorted({candidate.box for candidate in overlapping}, key=lambda box: (box not in own, box))
        for region, box in _cover(wanted.box, boxes, own):
            if box is None:
                yield MissingRegion(region, ranks[0], wanted.entries[ranks[0]])
            else:
                receivers.setdefault((region, box in own), []).extend(ranks)
    for (region, local), members in receivers.items():
        containing = tuple(candidate for candidate in overlapping if contains(candidate.box, region))
        everyone = len(members) == len(wanted.entries)
        entries = wanted.entries if everyone else {rank: wanted.entries[rank] for rank in members}
        holders = union(candidate.ranks for candidate in containing)
        yield Flow(region, wanted.dtype, wanted.copy, holders, containing, tuple(sorted(members)), entries, local)


def union(sets: Iterable[Ranks]) -> Ranks:
    """The ranks of all sets, ascending; a single set comes back as the object it is."""
    distinct = list({id(ranks): ranks for ranks in sets}.values())
    return distinct[0] if len(distinct) == 1 else tuple(sorted(set().union(*distinct)))


def contains(box: Box, part: Box) -> bool:
    return all(
        low <= start and start + extent <= low + whole
        for low, whole, start, extent in zip(box.lo, box.size, part.lo, part.size, strict=True)
    )


def _ranks_by_own_boxes(wanted: WantedBox, overlapping: Sequence[HeldBox]) -> list[tuple[Ranks, set[Box]]]:
    """The ranks that want a box, by the set of overlapping boxes that they hold themselves."""
    own_boxes: dict[int, set[Box]] = {rank: set() for rank in wanted.entries}
    for held_box in overlapping:
        for rank in own_boxes.keys() & set(held_box.ranks):
            own_boxes[rank].add(held_box.box)
    ranks_by_boxes: dict[frozenset[Box], list[int]] = {}
    for rank in sorted(own_boxes):
        ranks_by_boxes.setdefault(frozenset(own_boxes[rank]), []).append(rank)
    return [(tuple(ranks), set(boxes)) for boxes, ranks in ranks_by_boxes.items()]


def _cover(target: Box, boxes: Sequence[Box], own: set[Box]) -> Iterator[tuple[Box, Box | None]]:
    """Disjoint regions of `target`, each with the box it is taken from: own ones first, then the largest overlap."""
    remaining = [target] if target.elements else []
    while remaining:
        part = remaining.pop()
        best: tuple[bool, int] = (False, 0)
        region, source = part, None
        for box in boxes:
            common = intersect(box, part)
            if common and (box in own, common.elements) > best:
                best = box in own, common.elements
                region, source = common, box
        yield region, source
        if source is not None:
            remaining += subtract(part, region)
