"""The checksum against plain Python integers, and against every way in which weights go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aligner.reshard.checksum import Checksum

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def odd_numbers(stream: int, count: int) -> list[int]:
    """splitmix64 in Python's own integers."""
    found = []
    for index in range(1, count + 1):
        z = (index * 0x9E3779B97F4A7C15 + (stream << 48)) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append((z ^ (z >> 31)) | 1)
    return found


def reference(words: list[int]) -> int:
    """The formula of the docstring on signed 64-bit words, exactly."""
    word, half, row = odd_numbers(1, 2048), odd_numbers(2, 2048), odd_numbers(3, len(words) // 2048 + 1)
    row[0] = 1
    total = sum(row[i // 2048] * (word[i % 2048] * x + half[i % 2048] * (x >> 32)) for i, x in enumerate(words))
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def of(tensor: Tensor) -> int:
    return int(Checksum(CPU).tensor(tensor))


@pytest.mark.parametrize("count", [0, 1, 2, 2047, 2048, 2049, 4096, 2048 * 64, 2048 * 65 + 17])
def test_equals_python_integers(count: int) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(count))
    assert int(Checksum(CPU).words(words)) == reference(words.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (64, 96), (96, 2048)])
def test_every_flipped_bit_is_seen(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = of(tensor)
    raw = tensor.view(-1).view(torch.uint8)
    places = range(raw.numel()) if raw.numel() < 64 else (0, 1, raw.numel() // 2, raw.numel() - 2, raw.numel() - 1)
    for place in places:
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert of(tensor) != before
            raw[place] ^= 1 << bit
    assert of(tensor) == before


@pytest.mark.parametrize("columns", [1, 2, 3, 128, 2048, 5000])
def test_swapped_rows_are_seen(columns: int) -> None:
    tensor = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
    before = of(tensor)
    for a, b in [(0, 1), (0, 39), (7, 23), (38, 39)]:
        swapped = tensor.clone()
        swapped[[a, b]] = tensor[[b, a]]
        assert of(swapped) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_plain_numbers_are_seen(dtype: torch.dtype) -> None:
    """1.0 and 2.0 differ in their top bits only, where a plain weighted sum mod 2^64 misses one swap in hundreds."""
    checksum = Checksum(CPU)
    base = torch.ones(4096, dtype=dtype)
    base[::3] = 2.0
    base[1::5] = -1.0
    before = int(checksum.tensor(base))
    missed = 0
    for place in range(0, 4000):
        swapped = base.clone()
        other = place + 1 + place % 90
        swapped[place], swapped[other] = base[other], base[place]
        missed += bool(base[place] != base[other]) and int(checksum.tensor(swapped)) == before
    assert missed == 0


def test_swapped_halves_of_a_word_are_seen() -> None:
    pairs = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(500, 1)
    before = of(pairs)
    for row in range(0, 998, 3):
        swapped = pairs.clone()
        swapped[[row, row + 1]] = pairs[[row + 1, row]]
        assert of(swapped) != before


def test_shifted_and_stale_tensors_are_seen() -> None:
    new = torch.randn(300, 30, generator=torch.Generator().manual_seed(1))
    assert of(new) != of(new.roll(1))
    assert of(new) != of(new.roll(1, 0))
    assert of(new) != of(new * (1 + 1e-7))
    assert of(new) != of(torch.zeros_like(new))


def test_strided_views_are_read_in_their_own_order() -> None:
    tensor = torch.randn(30, 50, generator=torch.Generator().manual_seed(2))
    assert of(tensor.t()) == of(tensor.t().contiguous()) != of(tensor)


def test_other_arithmetic_gives_the_same_number() -> None:
    """CUDA multiplies and adds where the CPU takes matrix-vector products; both wrap."""
    words = torch.randint(-(2**63), 2**63 - 1, (7, 2048), generator=torch.Generator().manual_seed(3))
    weight = torch.randint(-(2**63), 2**63 - 1, (2048,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.mv(words, weight), (words * weight).sum(1))
