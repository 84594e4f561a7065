"""Copies within one process: every element once, cast and compared, or an error that names the tensor."""

from __future__ import annotations

import pytest
import torch

from aligner.reshard.local import LocalWeights, TensorWeights, copy_weights
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Piece, whole_tensor

WHOLE = whole_tensor("w", (4, 6), "float32")
TOP, BOTTOM = (Piece("w", (row, 0), (2, 6), "halves", place, (6, 1), "bfloat16") for row, place in ((0, 12), (2, 0)))


def test_a_copy_is_cast_and_in_its_place() -> None:
    source, halves = torch.randn(4, 6), torch.zeros(24, dtype=torch.bfloat16)
    from_ = LocalWeights([WHOLE], lambda piece: strided_view(source, piece))
    row = copy_weights(from_, TensorWeights({"halves": halves}, [TOP, BOTTOM]))
    assert torch.equal(halves.view(4, 6), torch.cat([source[2:], source[:2]]).bfloat16())
    assert (row.local_bytes, row.checksummed, row.moved_bytes) == (48, 2, 0)


def test_what_the_source_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"region \[2:4, 0:6\] of tensor w"):
        copy_weights(
            LocalWeights([TOP], lambda piece: torch.zeros(piece.size)), TensorWeights({"w": torch.zeros(4, 6)}, [WHOLE])
        )


def test_each_element_is_written_once() -> None:
    weights = TensorWeights({"halves": torch.zeros(24, dtype=torch.bfloat16)}, [TOP, BOTTOM])
    weights.written([TOP])
    with pytest.raises(RuntimeError, match=r"halves \(w\): 12 elements were not written"):
        weights.finish()
    weights.discard()
    for piece in (TOP, BOTTOM, TOP):
        weights.written([piece])
    with pytest.raises(RuntimeError, match=r"halves \(w\): 12 elements were written twice"):
        weights.finish()
