"""Regions of a tensor that lie in a flat range of its storage: a sharded optimizer's part of a parameter (pure arithmetic,
no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from aligner.reshard.plan.region import Piece


def clip(piece: Piece, start: int, stop: int) -> list[Piece]:
    """The parts of a piece that lie in the flat range start..stop-1 of its storage; their offsets count from `start`.

    For a matrix these are at most a part of a row, complete rows, and a part of a row. The piece's strides must nest.
    """
    dims = sorted(range(len(piece.size)), key=lambda dim: -piece.stride[dim])
    boxes = _boxes_in_range(piece, dims, piece.lo, piece.size, start - piece.offset, stop - piece.offset)
    crops = [piece.crop(lo, size) for lo, size in boxes]
    return [Piece(c.name, c.lo, c.size, c.storage, c.offset - start, c.stride, c.dtype) for c in crops]


Corner = tuple[int, ...]


def _boxes_in_range(
    piece: Piece, dims: Sequence[int], lo: Corner, size: Corner, start: int, stop: int
) -> Iterator[tuple[Corner, Corner]]:
    """The boxes (lo, size) inside the box (lo, size) whose elements have offsets start..stop-1 from its first element."""
    last = sum((size[dim] - 1) * piece.stride[dim] for dim in dims)
    if min(size, default=1) < 1 or last < start or stop <= 0:
        return
    if start <= 0 and last < stop:
        yield lo, size
        return
    dim, *rest = dims
    step, last_in_row = piece.stride[dim], last - (size[dim] - 1) * piece.stride[dim]
    partial = range(max(0, -(-(start - last_in_row) // step)), min(size[dim], (stop - 1) // step + 1))
    complete = range(max(0, -(-start // step)), min(size[dim], (stop - 1 - last_in_row) // step + 1))

    def rows(index: int, count: int) -> tuple[Corner, Corner]:
        return (*lo[:dim], lo[dim] + index, *lo[dim + 1 :]), (*size[:dim], count, *size[dim + 1 :])

    incomplete = (
        chain(range(partial.start, complete.start), range(complete.stop, partial.stop)) if complete else partial
    )
    for index in incomplete:
        yield from _boxes_in_range(piece, rest, *rows(index, 1), start - index * step, stop - index * step)
    if complete:
        yield rows(complete.start, len(complete))
