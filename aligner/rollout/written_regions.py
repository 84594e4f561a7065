"""Which regions of an engine's weights one transfer has written: each exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aligner.reshard.plan.region import Box, Piece, intersect


@dataclass
class WrittenRegions:
    """The regions written in one transfer."""

    boxes: dict[tuple[str, str], list[Box]] = field(default_factory=dict)
    """(storage, tensor) -> its regions."""
    elements: dict[str, int] = field(default_factory=dict)
    """Elements written of each storage."""

    def add(self, piece: Piece) -> None:
        """Count a region. RuntimeError where it, or a part of it, was written before."""
        boxes = self.boxes.setdefault((piece.storage, piece.name), [])
        if any(intersect(piece.box, box) for box in boxes):
            raise RuntimeError(f"reshard: {piece.name}{piece.box} was written twice into {piece.storage}")
        boxes.append(piece.box)
        self.elements[piece.storage] = self.elements.get(piece.storage, 0) + piece.elements

    def check_complete(self, pieces: Sequence[Piece]) -> None:
        """RuntimeError, naming the tensor, unless every one of `pieces` was written."""
        wanted: dict[tuple[str, str], int] = {}
        for piece in pieces:
            place = (piece.storage, piece.name)
            wanted[place] = wanted.get(place, 0) + piece.elements
        for place, total in wanted.items():
            done = sum(box.elements for box in self.boxes.get(place, ()))
            if done < total:
                raise RuntimeError(f"reshard: {total - done} of {total} elements of {place[1]} were not written")
