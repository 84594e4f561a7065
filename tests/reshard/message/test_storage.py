"""Pieces of one storage: those that share an element are found, exactly, and named."""

from __future__ import annotations

import random

import numpy as np
import pytest

from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import check_disjoint
from aligner.reshard.plan.region import Piece, whole_tensor


def piece(name: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...], storage: str = "fused") -> Piece:
    return Piece(name, (0,) * len(size), size, storage, offset, stride, "float32")


def test_rows_and_columns_side_by_side_share_nothing() -> None:
    check_disjoint([piece("q", 0, (4, 6), (6, 1)), piece("k", 24, (2, 6), (6, 1)), piece("scalar", 36, (), ())])
    check_disjoint([piece("gate", 0, (5, 3), (7, 1)), piece("up", 3, (5, 4), (7, 1))])
    check_disjoint([piece("a", 0, (4,), (1,), "one"), piece("b", 0, (4,), (1,), "two")])
    check_disjoint([piece("empty", 0, (0, 3), (3, 1)), piece("b", 0, (4,), (1,))])
    check_disjoint([])


@pytest.mark.parametrize("offset", [0, 5, 23])
def test_storage_and_both_tensors_are_named(offset: int) -> None:
    layout = [piece("q", 0, (4, 6), (6, 1)), piece("k", offset, (2, 6), (6, 1)), piece("v", 60, (6,), (1,))]
    with pytest.raises(ValueError, match=r"fused holds q\[0:4, 0:6\] and k\[0:2, 0:6\] in the same elements"):
        check_disjoint(layout)
    with pytest.raises(ValueError, match="in the same elements"):
        TensorWeights({}, layout)


def test_a_piece_that_overlaps_itself_is_named() -> None:
    with pytest.raises(ValueError, match=r"fused holds w\[0:3, 0:4\] and w\[0:3, 0:4\]"):
        check_disjoint([piece("w", 0, (3, 4), (2, 1))])
    with pytest.raises(ValueError, match="in the same elements"):
        check_disjoint([piece("w", 0, (3, 4), (0, 1))])
    check_disjoint([piece("w", 0, (2, 2), (3, 2)), whole_tensor("v", (3,), "float32")])


def test_random_pieces_against_a_count_of_writes() -> None:
    found = [0, 0]
    for seed in range(400):
        draw = random.Random(seed)
        layout = []
        for number in range(draw.randrange(1, 4)):
            size = tuple(draw.randrange(1, 4) for _ in range(draw.randrange(0, 4)))
            layout.append(piece(f"t{number}", draw.randrange(20), size, tuple(draw.randrange(1, 9) for _ in size)))
        writes = np.zeros(100, dtype=int)
        for one in layout:
            for index in np.ndindex(*one.size):
                writes[one.offset + sum(i * step for i, step in zip(index, one.stride, strict=True))] += 1
        overlap = bool((writes > 1).any())
        found[overlap] += 1
        if overlap:
            with pytest.raises(ValueError, match="in the same elements"):
                check_disjoint(layout)
        else:
            check_disjoint(layout)
    assert min(found) > 50, found
