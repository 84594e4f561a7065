"""Checksums that prove a message: exact, sensitive to every bit and to every position, equal on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW_WORDS = 2048
"""A sum covers 16 KiB: the bytes of a message that one sum stands for."""
CELL_BYTES = 1024
"""|byte| <= 128, |weight| <= 64: a cell's sum stays within 2^23, exact in float32, and pairs of products in int16."""
CELLS = ROW_WORDS * 8 // CELL_BYTES
COLUMNS = 3
_BLOCK_CELLS = 512  # 512 KiB at a time: read once from memory, if at all, and twice from the cache
_GOLDEN = 0x9E3779B97F4A7C15


class Checksum:
    """64-bit sums of a message's rows of 16 KiB, read as signed bytes x_p.

        sum_p  V_p * x_p  mod 2^64,    V_p = sum_j W[j, p // 1024] * w[p % 1024, j],    j = 0, 1, 2

    w are fixed pseudo-random weights in -64..63 whose sum over j is odd; W are fixed odd pseudo-random 64-bit numbers.
    So every V_p is odd: one changed bit, indeed one changed byte, always changes the sum. The inner sums over a cell of
    1024 bytes are over the integers, where no top bit vanishes as it would mod 2^64. Two bytes of a cell that change
    places always show, since no two w[p] are equal. Words, elements and runs that change places escape with a chance
    of at most about 2^-21, reached where they differ in two bytes by the same amount; bf16's 1.0 and 2.0 with 2^-39.

    Measured on one thread of a shared machine (AMD EPYC of family 26, 32 MiB of L3, AVX-512 VNNI, torch 2.13):
    20-22 GB/s on 8 MiB, 12-13 on 1 MiB, 10-15 on 64 MiB from memory, 45 us on a single row. The inner sums alone run
    at 25-29 GB/s in the cache. Other ways in the cache: one integer matrix-vector product 23 GB/s, but it is blind to
    swaps of top bits, and with a shifted copy beside it 8; multiply-and-fold in halves 23, as blind; `_int_mm` with
    four columns at once 15.
    """

    def __init__(self, device: torch.device) -> None:
        byte, cell = weights(device)
        self._columns = [byte[:, j : j + 1].contiguous() for j in range(COLUMNS)]
        self._byte, self._cell = byte.to(torch.float32), cell

    def rows(self, words: Tensor) -> Tensor:
        """The sums (rows,) int64 of whole rows (rows * 2048 contiguous int64)."""
        return RowSums(self, words).finish()

    def cells(self, data: Tensor, found: Sequence[Tensor]) -> None:
        """The inner sums of cells (n, 1024) int8, one (n, 1) int32 per column."""
        if data.device.type == "cpu":
            # One column at a time: oneDNN's product of a matrix and a single column is some five times faster.
            for column, sums in zip(self._columns, found, strict=True):
                torch._int_mm(data, column, out=sums)
        else:
            for column, sums in zip((data.to(torch.float32) @ self._byte).split(1, 1), found, strict=True):
                sums.copy_(column)

    def combine(self, found: Tensor) -> Tensor:
        """Row sums (rows,) int64 from inner sums (columns, cells, 1) int32."""
        sums = torch.zeros(found.shape[1] // CELLS, dtype=torch.int64, device=found.device)
        for column, weight in zip(found.view(COLUMNS, -1, CELLS), self._cell, strict=True):
            wide = column.to(torch.int64)
            # CUDA has no integer product of a matrix and a vector.
            sums += torch.mv(wide, weight) if wide.device.type == "cpu" else (wide * weight).sum(1)
        return sums


class RowSums:
    """The sums of a message's rows while it is being written: each block is summed as long as it is in the cache."""

    def __init__(self, checksum: Checksum, words: Tensor) -> None:
        assert words.dtype == torch.int64 and words.dim() == 1 and words.is_contiguous()
        assert words.numel() % ROW_WORDS == 0, f"{words.numel()} words are not whole rows of {ROW_WORDS}"
        data = words.view(torch.int8).view(-1, CELL_BYTES)
        self._checksum = checksum
        self._found = torch.empty(COLUMNS, len(data), 1, dtype=torch.int32, device=words.device)
        # Cut beforehand: slices made one by one take as long as the sums.
        self._blocks = list(
            zip(data.split(_BLOCK_CELLS), *(column.split(_BLOCK_CELLS) for column in self._found), strict=True)
        )
        self._done = 0

    def written(self, words: int) -> None:
        """The first `words` words are final; sums the whole blocks among them."""
        self._up_to(min(words * 8 // (_BLOCK_CELLS * CELL_BYTES), len(self._blocks)))

    def finish(self) -> Tensor:
        """All words are final: the sums (rows,) int64."""
        self._up_to(len(self._blocks))
        return self._checksum.combine(self._found)

    def _up_to(self, block: int) -> None:
        for data, *found in self._blocks[self._done : block]:
            self._checksum.cells(data, found)
        self._done = max(self._done, block)


def weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights of the bytes of a cell (1024, columns) int8, and of the cells of a row (columns, cells) int64."""
    drawn = _numbers(3, CELL_BYTES * COLUMNS, device).view(CELL_BYTES, COLUMNS)
    byte = (drawn & 127) - 64
    byte[:, 0] ^= (byte.sum(1) & 1) ^ 1
    cell = _numbers(2, COLUMNS * CELLS, device).view(COLUMNS, CELLS) | 1
    return byte.to(torch.int8), cell


def _numbers(stream: int, count: int, device: torch.device) -> Tensor:
    """`count` fixed 64-bit numbers (splitmix64, Steele et al. 2014), the same on every machine."""
    state = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN) + (stream << 48)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own copies the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - (1 << 64) if number >> 63 else number
