"""The regions of a tensor that lie in a flat range of the memory that holds it: what a sharded optimizer has of a parameter
(pure arithmetic, no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from aligner.reshard.plan.region import Piece


def clip(piece: Piece, start: int, stop: int) -> list[Piece]:
    """The parts of a piece that lie in the flat range start..stop-1 of its storage; their offsets count from `start`.

    Of a matrix these are a part of a row, whole rows, and a part of a row, at most. The piece's strides must nest.
    """
    dims = sorted(range(len(piece.size)), key=lambda dim: -piece.stride[dim])
    boxes = _inside(piece, dims, piece.lo, piece.size, start - piece.offset, stop - piece.offset)
    crops = [piece.crop(lo, size) for lo, size in boxes]
    return [Piece(p.name, p.lo, p.size, p.storage, p.offset - start, p.stride, p.dtype) for p in crops]


Corner = tuple[int, ...]


def _inside(
    piece: Piece, dims: Sequence[int], lo: Corner, size: Corner, start: int, stop: int
) -> Iterator[tuple[Corner, Corner]]:
    """The boxes inside (lo, size) whose elements have places start..stop-1, counted from the first one's."""
    reach = sum((size[dim] - 1) * piece.stride[dim] for dim in dims)
    if min(size, default=1) < 1 or reach < start or stop <= 0:
        return
    if start <= 0 and reach < stop:
        yield lo, size
        return
    dim, *rest = dims
    step, row = piece.stride[dim], reach - (size[dim] - 1) * piece.stride[dim]
    touched = range(max(0, -(-(start - row) // step)), min(size[dim], (stop - 1) // step + 1))
    whole = range(max(0, -(-start // step)), min(size[dim], (stop - 1 - row) // step + 1))

    def rows(at: int, count: int) -> tuple[Corner, Corner]:
        return (*lo[:dim], lo[dim] + at, *lo[dim + 1 :]), (*size[:dim], count, *size[dim + 1 :])

    around = chain(range(touched.start, whole.start), range(whole.stop, touched.stop)) if whole else touched
    for at in around:
        yield from _inside(piece, rest, *rows(at, 1), start - at * step, stop - at * step)
    if whole:
        yield rows(whole.start, len(whole))
