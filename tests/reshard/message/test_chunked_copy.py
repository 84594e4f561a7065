"""Copies by chunks: any strides and dtypes, against torch's own copy; and what they notice."""

from __future__ import annotations

import pytest
import torch
import xxhash
from torch import Tensor

from aligner.reshard.message.chunked_copy import CHUNK_BYTES, ChunkBuffers, copy, copy_hashed, copy_verified

SCRATCH = ChunkBuffers()
WIDE = CHUNK_BYTES // 4 + 5


def strided(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] zeros: in a row, a slice of columns of something wider, or transposed."""
    if kind == "row":
        return torch.zeros(rows, columns, dtype=dtype)
    if kind == "columns":
        return torch.zeros(rows, 2 * columns + 3, dtype=dtype)[:, 3 : 3 + columns]
    return torch.zeros(columns, rows, dtype=dtype).t()


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (3, WIDE), (300, 1001)])
@pytest.mark.parametrize("source", ["row", "columns", "transposed"])
@pytest.mark.parametrize("target", ["row", "columns", "transposed"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                    (torch.bfloat16, torch.float32)])  # fmt: skip
def test_copies_are_torchs(
    shape: tuple[int, int], source: str, target: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    read = strided(source, *shape, dtypes[0]).normal_(generator=torch.Generator().manual_seed(1))
    expected = read.to(dtypes[1])
    for proven in (False, True):
        written: list[int] = []
        to = strided(target, *shape, dtypes[1])
        if proven:
            assert copy_verified(to, to, read, SCRATCH, written.append)
        else:
            copy(to, read, SCRATCH, written.append)
        assert torch.equal(to, expected)
        assert written == sorted(set(written)) and written[-1] == to.nbytes
        assert max(b - a for a, b in zip([0, *written], written, strict=False)) <= CHUNK_BYTES


@pytest.mark.parametrize("source", ["row", "columns", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [(0, 0), (150, 500), (299, 1000)])
def test_a_storage_that_does_not_hold_what_was_written_is_noticed(
    source: str, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    read = strided(source, 300, 1001, torch.float32).normal_(generator=torch.Generator().manual_seed(2))
    for kind in ("row", "columns"):
        to, again = (strided(kind, 300, 1001, dtype) for _ in range(2))
        again.copy_(read)
        assert copy_verified(to, again, read, SCRATCH)
        again.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[place] ^= 1
        assert not copy_verified(to, again, read, SCRATCH)


@pytest.mark.parametrize("source", ["row", "columns", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (3, WIDE), (300, 1001)])
def test_the_hash_is_of_what_the_storage_holds(source: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """In order and whole; of another storage than was written, what that one holds."""
    read = strided(source, *shape, torch.float32).normal_(generator=torch.Generator().manual_seed(3))
    for kind in ("row", "columns", "transposed"):
        to, other = (strided(kind, *shape, dtype) for _ in range(2))
        for again in (to, other.fill_(2.0)):
            seen = copy_hashed(to, again, read, SCRATCH)
            assert torch.equal(to, read.to(dtype))
            held = again.contiguous().view(-1).view(torch.int16).numpy().tobytes()
            assert seen % (1 << 64) == xxhash.xxh3_64_intdigest(held)


def test_a_zero_of_the_other_sign_differs_and_a_nan_is_itself() -> None:
    read, to = torch.tensor([[0.0, float("nan")]]), torch.empty(1, 2)
    assert copy_verified(to, to, read, SCRATCH)
    assert not copy_verified(to, torch.tensor([[-0.0, float("nan")]]), read, SCRATCH)
