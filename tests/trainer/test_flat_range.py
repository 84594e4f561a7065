"""The part of a strided piece that lies in a range of its storage, against a count of its elements."""

from __future__ import annotations

import itertools

from hypothesis import given, strategies

from aligner.reshard.plan.region import Piece
from aligner.trainer.flat_range import clip


@strategies.composite
def pieces(draw: strategies.DrawFn) -> Piece:
    """A box of up to 3 dimensions whose strides nest, in any order, with gaps."""
    size = tuple(draw(strategies.lists(strategies.integers(1, 5), max_size=3)))
    strides, step = [0] * len(size), 1
    for dim in draw(strategies.permutations(range(len(size)))):
        step += draw(strategies.integers(0, 2)) if step > 1 else 0
        strides[dim] = step
        step *= size[dim]
    lo = tuple(draw(strategies.integers(0, 4)) for _ in size)
    return Piece("weight", lo, size, "storage", draw(strategies.integers(0, 7)), tuple(strides), "float32")


def places(piece: Piece) -> list[tuple[tuple[int, ...], int]]:
    """(element of the tensor, its place in the storage), one by one."""
    steps = itertools.product(*map(range, piece.size))
    return [
        (
            tuple(lo + i for lo, i in zip(piece.lo, step, strict=True)),
            piece.offset + sum(i * stride for i, stride in zip(step, piece.stride, strict=True)),
        )
        for step in steps
    ]


@given(pieces(), strategies.integers(0, 20), strategies.integers(0, 40))
def test_clip_takes_exactly_the_elements_in_the_range(piece: Piece, start: int, length: int) -> None:
    expected = [(at, place - start) for at, place in places(piece) if start <= place < start + length]
    found = [one for part in clip(piece, start, start + length) for one in places(part)]
    assert sorted(found) == sorted(expected)
