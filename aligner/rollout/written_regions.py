"""Which regions of an engine's weights one transfer has written: each exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aligner.reshard.plan.region import Piece, intersect


@dataclass
class WrittenRegions:
    """The regions written in one transfer."""

    regions: dict[tuple[str, str], list[Piece]] = field(default_factory=dict)
    """(storage, tensor) -> its regions."""
    elements: dict[str, int] = field(default_factory=dict)
    """Elements written of each storage."""

    def add(self, piece: Piece) -> int:
        """Count a region; returns how many elements of its storage have been written. RuntimeError where it, or a part of
        it, was written before."""
        storage = piece.storage
        regions = self.regions.setdefault((storage, piece.name), [])
        for region in regions:
            if intersect(piece, region):
                raise RuntimeError(f"reshard: {piece.name}{piece.box} was written twice into {storage}")
        regions.append(piece)
        self.elements[storage] = written = self.elements.get(storage, 0) + piece.elements
        return written

    def check_complete(self, pieces: Sequence[Piece]) -> None:
        """RuntimeError, naming the tensor, unless every one of `pieces` was written."""
        wanted: dict[tuple[str, str], int] = {}
        for piece in pieces:
            place = (piece.storage, piece.name)
            wanted[place] = wanted.get(place, 0) + piece.elements
        for place, total in wanted.items():
            done = sum(region.elements for region in self.regions.get(place, ()))
            if done < total:
                raise RuntimeError(f"reshard: {total - done} of {total} elements of {place[1]} were not written")
