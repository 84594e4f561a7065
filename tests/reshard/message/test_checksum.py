"""The checksum against plain Python integers, and against every way in which weights go wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import xxhash
from torch import Tensor

from aligner.reshard.message.checksum import (
    CELL_BYTES,
    COLUMNS,
    ROW_WORDS,
    Checksum,
    Hashes,
    StreamingHash,
    Sums,
    hash_of,
    weights,
)
from aligner.reshard.message.chunked_copy import bytes_of

CPU = torch.device("cpu")
MASK = (1 << 64) - 1
ROW_BYTES = 16384


def numbers(stream: int, count: int) -> list[int]:
    """splitmix64 in Python's own integers."""
    found = []
    for index in range(1, count + 1):
        z = (index * 0x9E3779B97F4A7C15 + (stream << 48)) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


@cache
def reference_weights() -> list[int]:
    """The docstring's V_p: one 64-bit weight for each byte of a row."""
    drawn = [(number & 127) - 64 for number in numbers(3, 1024 * 3)]
    cell = [number | 1 for number in numbers(2, 3 * 16)]
    byte = [drawn[3 * place : 3 * place + 3] for place in range(1024)]
    for triple in byte:
        if sum(triple) % 2 == 0:
            triple[0] ^= 1
    return [sum(cell[16 * j + p // 1024] * byte[p % 1024][j] for j in range(3)) for p in range(ROW_BYTES)]


def reference(row: bytes) -> int:
    signed = (value - 256 if value > 127 else value for value in row)
    total = sum(weight * x for weight, x in zip(reference_weights(), signed, strict=True)) & MASK
    return total - (1 << 64) if total >> 63 else total


def padded(tensor: Tensor, row_words: int) -> Tensor:
    """A tensor's elements in row-major order as whole rows of words."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    words = torch.zeros(max(1, -(-raw.numel() // (8 * row_words))) * row_words, dtype=torch.int64)
    words.view(torch.uint8)[: raw.numel()] = raw
    return words


SUMS = Sums(CPU)


@pytest.fixture(params=[Hashes(), SUMS], ids=["hashes", "sums"])
def checksum(request: pytest.FixtureRequest) -> Checksum:
    found: Checksum = request.param
    return found


@pytest.fixture
def of(checksum: Checksum) -> Callable[[Tensor], list[int]]:
    return lambda tensor: checksum.rows(padded(tensor, checksum.row_words)).tolist()


Of = Callable[[Tensor], list[int]]


def random_words(rows: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows * ROW_WORDS,), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_equals_python_integers(rows: int) -> None:
    words = random_words(rows)
    raw = bytes(words.view(torch.uint8).tolist())
    expected = [reference(raw[row * ROW_BYTES : (row + 1) * ROW_BYTES]) for row in range(rows)]
    assert SUMS.rows(words).tolist() == expected


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
def test_extreme_bytes_do_not_saturate(fill: int) -> None:
    """A processor's 8-bit products are summed in pairs of 16 bits on some machines."""
    words = torch.full((ROW_BYTES,), fill, dtype=torch.uint8).view(torch.int64)
    assert SUMS.rows(words).tolist() == [reference(bytes([fill]) * ROW_BYTES)]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_that_are_summed_as_they_come_are_those_of_single_rows(checksum: Checksum, rows: int) -> None:
    size = checksum.row_words
    words = random_words(rows * size // ROW_WORDS)
    alone = torch.cat([checksum.rows(row) for row in words.split(size)])
    assert torch.equal(checksum.rows(words), alone) and len(set(alone.tolist())) == rows
    arriving = torch.zeros_like(words)
    running = checksum.start(arriving)
    for written in range(0, words.numel(), 5003):
        arriving[:written] = words[:written]
        running.written(written)
    arriving.copy_(words)
    assert running.finish() == alone.tolist()


@pytest.mark.parametrize("size", [1, 7, 1000, 100_003])
def test_one_hash_of_an_item_is_the_same_part_by_part(size: int) -> None:
    """XXH3's own values, whatever the dtype."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(size)).bfloat16()
    data = drawn.view(torch.int16).numpy().tobytes()
    parts = StreamingHash()
    for start in range(0, len(data), 1417):
        parts.add(memoryview(data)[start : start + 1417])
    expected = xxhash.xxh3_64_intdigest(data)
    assert parts.finish() == hash_of(bytes_of(drawn)) == expected - (expected >> 63 << 64)


def test_hashes_are_xxh3() -> None:
    """The digest of 64 KiB of zeros by the reference implementation's own command, xxhsum 0.8 -H3."""
    assert Hashes().rows(torch.zeros(Hashes.row_words, dtype=torch.int64)).tolist() == [0x33B202D302B65CAA]


def test_float32_products_give_the_same_sums() -> None:
    """Other devices than the CPU take float32 products of the same cells."""
    byte, _ = weights(CPU)
    data = random_words(3).view(torch.int8).view(-1, CELL_BYTES).clone()
    data[0], data[1] = -128, 127
    assert torch.equal((data.float() @ byte.float()).long(), data.long() @ byte.long())


def test_every_byte_has_an_odd_weight_and_no_two_of_a_cell_the_same() -> None:
    assert all(weight % 2 for weight in reference_weights())
    byte, cell = weights(CPU)
    assert byte.shape == (CELL_BYTES, COLUMNS) and len(set(map(tuple, byte.tolist()))) == CELL_BYTES
    assert int(byte.min()) >= -64 and int(byte.max()) <= 63
    assert bool((cell & 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (64, 96), (96, 2048)])
def test_every_flipped_bit_is_seen(checksum: Checksum, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    words = padded(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), checksum.row_words)
    before = checksum.rows(words)
    raw = words.view(torch.uint8)
    for place in (*range(0, min(raw.numel(), 64)), raw.numel() // 2, raw.numel() - 2, raw.numel() - 1):
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert (checksum.rows(words) != before).nonzero().tolist() == [[place // (8 * checksum.row_words)]]
            raw[place] ^= 1 << bit
    assert torch.equal(checksum.rows(words), before)


@pytest.mark.parametrize("columns", [1, 2, 3, 128, 2048, 5000])
def test_swapped_rows_are_seen(of: Of, columns: int) -> None:
    tensor = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
    before = of(tensor)
    for a, b in [(0, 1), (0, 39), (7, 23), (38, 39)]:
        swapped = tensor.clone()
        swapped[[a, b]] = tensor[[b, a]]
        assert of(swapped) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reach", [90, 2000])
def test_swapped_plain_numbers_are_seen(of: Of, dtype: torch.dtype, reach: int) -> None:
    """1.0 and 2.0, x and -x differ in top bits only, where a plain weighted sum mod 2^64 misses one swap in hundreds."""
    base = torch.ones(4096, dtype=dtype)
    base[::3] = 2.0
    base[1::5] = -1.0
    before = of(base)
    missed = 0
    for place in range(0, 4000):
        swapped = base.clone()
        other = (place + 1 + place % reach) % 4096
        swapped[place], swapped[other] = base[other], base[place]
        missed += bool(base[place] != base[other]) and of(swapped) == before
    assert missed == 0


def test_swapped_rows_of_a_permutation_are_seen(of: Of) -> None:
    """Rows of equal sums, columns of equal sums: only the places tell them apart."""
    ones = torch.eye(128)[torch.randperm(128, generator=torch.Generator().manual_seed(5))]
    before = of(ones)
    for a in range(127):
        swapped = ones.clone()
        swapped[[a, a + 1]] = ones[[a + 1, a]]
        assert of(swapped) != before


def test_swapped_halves_of_a_word_are_seen(of: Of) -> None:
    pairs = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(500, 1)
    before = of(pairs)
    for row in range(0, 998, 3):
        swapped = pairs.clone()
        swapped[[row, row + 1]] = pairs[[row + 1, row]]
        assert of(swapped) != before


def test_shifted_and_stale_tensors_are_seen(of: Of) -> None:
    new = torch.randn(300, 30, generator=torch.Generator().manual_seed(1))
    assert of(new) != of(new.roll(1))
    assert of(new) != of(new.roll(1, 0))
    assert of(new) != of(new * (1 + 1e-7))
    assert of(new) != of(torch.zeros_like(new))
