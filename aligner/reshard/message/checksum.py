"""Checksums that prove a message, one for each row of it: hashes on the CPU, sums on CUDA."""

from __future__ import annotations

from typing import Protocol

import torch
import xxhash
from torch import Tensor

ROW_WORDS = 2048
"""A sum covers 16 KiB."""
CELL_BYTES = 1024
"""|byte| <= 128, |weight| <= 64: a cell's sum stays within 2^23, exact in float32, and pairs of products in int16."""
CELLS = ROW_WORDS * 8 // CELL_BYTES
COLUMNS = 3
_HASHED_WORDS = 8192  # 64 KiB: smaller rows spend a third of their time in the call
_GOLDEN = 0x9E3779B97F4A7C15


class Checksum(Protocol):
    """One 64-bit number for each row of a message; whoever compares two of them made both on one kind of device."""

    row_words: int

    def start(self, words: Tensor) -> RunningChecksums:
        """The checksums of whole rows (rows * row_words contiguous int64) that are about to be written."""

    def rows(self, words: Tensor) -> Tensor:
        """The checksums (rows,) int64 of rows that are there already."""


class RunningChecksums(Protocol):
    """Checksums computed while a message is being written, of each row while it is in the cache."""

    def written(self, words: int) -> None:
        """The first `words` words are final."""

    def finish(self) -> list[int]:
        """All words are final: the checksums, signed."""


class Hashes:
    """XXH3, 64 bits, of rows of 64 KiB: https://github.com/Cyan4973/xxHash. Different rows agree with chance 2^-64.

    In the cache it reads 110 to 140 GB/s on one thread (AMD EPYC of family 26, AVX-512), ten times what torch's own
    integer products reach, and twice as much as a copy.
    """

    row_words = _HASHED_WORDS

    def start(self, words: Tensor) -> RunningChecksums:
        return _RunningHashes(words)

    def rows(self, words: Tensor) -> Tensor:
        return torch.tensor(self.start(words).finish(), dtype=torch.int64)


class _RunningHashes:
    def __init__(self, words: Tensor) -> None:
        _check_rows(words, _HASHED_WORDS)
        self._rows = words.view(-1, _HASHED_WORDS).numpy()
        self._hashes: list[int] = []

    def written(self, words: int) -> None:
        done = len(self._hashes)
        if words >= (done + 1) * _HASHED_WORDS:
            rows = self._rows[done : words // _HASHED_WORDS]
            self._hashes += [hash_of(row.data) for row in rows]

    def finish(self) -> list[int]:
        self.written(self._rows.size)
        return self._hashes


def hash_of(data: memoryview) -> int:
    """XXH3 of bytes in one call, signed."""
    return _signed(xxhash.xxh3_64_intdigest(data))


class StreamingHash:
    """`hash_of` of bytes that are given part by part."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self.add = self._hash.update

    def finish(self) -> int:
        return _signed(self._hash.intdigest())


class Sums:
    """64-bit sums of rows of 16 KiB, read as signed bytes x_p; a sum is linear, so pieces of a row may be added.

        sum_p  V_p * x_p  mod 2^64,    V_p = sum_j W[j, p // 1024] * w[p % 1024, j],    j = 0, 1, 2

    w are fixed pseudo-random weights in -64..63 whose sum over j is odd; W are fixed odd pseudo-random 64-bit numbers.
    So every V_p is odd: one changed bit, indeed one changed byte, always changes the sum. The inner sums over a cell of
    1024 bytes are over the integers, where no top bit vanishes as it would mod 2^64. Two bytes of a cell that change
    places always show, since no two w[p] are equal. Words, elements and runs that change places escape with a chance
    of at most about 2^-21, reached where they differ in two bytes by the same amount; bf16's 1.0 and 2.0 with 2^-39.
    """

    row_words = ROW_WORDS

    def __init__(self, device: torch.device) -> None:
        byte, self._cell = weights(device)
        self._byte = byte.to(torch.float32)

    def start(self, words: Tensor) -> RunningChecksums:
        return _AllSums(self, words)

    def rows(self, words: Tensor) -> Tensor:
        _check_rows(words, ROW_WORDS)
        cells = words.view(torch.int8).view(-1, CELLS, CELL_BYTES).to(torch.float32) @ self._byte
        # Not a matrix product: CUDA has none for integers.
        return (cells.to(torch.int64) * self._cell.t()).sum((1, 2))


class _AllSums:
    """Sums everything at the end: on CUDA a launch for each part would cost more than its bytes."""

    def __init__(self, checksum: Sums, words: Tensor) -> None:
        self._checksum, self._words = checksum, words

    def written(self, words: int) -> None: ...

    def finish(self) -> list[int]:
        return self._checksum.rows(self._words).tolist()


def _check_rows(words: Tensor, size: int) -> None:
    assert words.dtype == torch.int64 and words.dim() == 1 and words.is_contiguous()
    assert words.numel() % size == 0, f"{words.numel()} words are not whole rows of {size}"


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
