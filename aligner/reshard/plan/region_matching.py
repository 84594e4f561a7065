"""Which regions of a tensor fill the boxes that destination ranks want, and which ranks could send each (pure, no torch)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aligner.reshard.plan.region import Box, intersect, subtract

Ranks = tuple[int, ...]


class Held(NamedTuple):
    """A box that some ranks hold in one form; `entry` is its number in the source's `holders`."""

    box: Box
    ranks: Ranks
    entry: int


class Wanted(NamedTuple):
    """A box that some ranks want in one data type; `entries` gives every rank the form in which it wants it."""

    box: Box
    dtype: str
    copy: int
    """Counts where one rank wants the same box several times."""
    entries: dict[int, int]


@dataclass(frozen=True)
class Flow:
    """One region that some ranks hold and others want."""

    region: Box
    dtype: str
    copy: int
    holders: Ranks
    """Every rank that could send the region; where it is `kept`, meaningless."""
    forms: tuple[Held, ...]
    """The boxes that contain the region."""
    wanters: Ranks
    entries: dict[int, int]
    kept: bool
    """The wanters hold the region themselves."""

    def form(self, rank: int) -> int:
        """The source's entry in which `rank` holds the region, the first one for a rank that does not."""
        return next((held.entry for held in self.forms if rank in held.ranks), self.forms[0].entry)


class Missing(NamedTuple):
    """A region that nobody holds and a rank that wants it."""

    region: Box
    rank: int
    entry: int


def wanted(entries: Sequence[tuple[Box, str, Ranks]], boxes: Container[Box]) -> list[Wanted]:
    """The distinct (box, dtype) of a tensor with the ranks that want them, for these boxes; equal on every rank."""
    found: dict[tuple[Box, str], list[int]] = {}
    for entry, (box, dtype, _) in enumerate(entries):
        if box in boxes:
            found.setdefault((box, dtype), []).append(entry)
    classes = []
    for (box, dtype), numbers in sorted(found.items()):
        copies: list[dict[int, int]] = []
        for entry in numbers:
            for rank in entries[entry][2]:
                place = next((copy for copy in copies if rank not in copy), None)
                if place is None:
                    place = {}
                    copies.append(place)
                place[rank] = entry
        classes += [Wanted(box, dtype, copy, forms) for copy, forms in enumerate(copies)]
    return classes


def flows(want: Wanted, held: Sequence[Held]) -> Iterator[Flow | Missing]:
    """`want` as regions, each with all ranks that want just it and do not hold it.

    For ranks that hold the same boxes they are disjoint and make up the box; what ranks hold comes from themselves.
    """
    near = [one for one in held if intersect(one.box, want.box)]
    wanters: dict[tuple[Box, bool], list[int]] = {}
    for ranks, own in _alike(want, near):
        boxes = sorted({one.box for one in near}, key=lambda box: (box not in own, box))
        for region, box in _cover(want.box, boxes, own):
            if box is None:
                yield Missing(region, ranks[0], want.entries[ranks[0]])
            else:
                wanters.setdefault((region, box in own), []).extend(ranks)
    for (region, kept), found in wanters.items():
        forms = tuple(one for one in near if contains(one.box, region))
        entries = want.entries if len(found) == len(want.entries) else {rank: want.entries[rank] for rank in found}
        holders = union(one.ranks for one in forms)
        yield Flow(region, want.dtype, want.copy, holders, forms, tuple(sorted(found)), entries, kept)


def union(sets: Iterable[Ranks]) -> Ranks:
    """The ranks of all sets, ascending; a single set comes back as the object it is."""
    distinct = list({id(ranks): ranks for ranks in sets}.values())
    return distinct[0] if len(distinct) == 1 else tuple(sorted(set().union(*distinct)))


def contains(box: Box, part: Box) -> bool:
    return all(
        low <= start and start + extent <= low + whole
        for low, whole, start, extent in zip(box.lo, box.size, part.lo, part.size, strict=True)
    )


def _alike(want: Wanted, near: Sequence[Held]) -> list[tuple[Ranks, set[Box]]]:
    """The wanting ranks by the set of near boxes that they hold themselves."""
    own: dict[int, set[Box]] = {rank: set() for rank in want.entries}
    for one in near:
        for rank in own.keys() & set(one.ranks):
            own[rank].add(one.box)
    alike: dict[frozenset[Box], list[int]] = {}
    for rank in sorted(own):
        alike.setdefault(frozenset(own[rank]), []).append(rank)
    return [(tuple(ranks), set(boxes)) for boxes, ranks in alike.items()]


def _cover(whole: Box, boxes: Sequence[Box], own: set[Box]) -> Iterator[tuple[Box, Box | None]]:
    """Disjoint regions of `whole`, each with the box it is taken from: own ones first, then the largest overlap."""
    left = [whole] if whole.elements else []
    while left:
        part = left.pop()
        best: tuple[bool, int] = (False, 0)
        region, source = part, None
        for box in boxes:
            common = intersect(box, part)
            if common and (box in own, common.elements) > best:
                best = box in own, common.elements
                region, source = common, box
        yield region, source
        if source is not None:
            left += subtract(part, region)
