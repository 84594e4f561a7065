"""Deltas: exact round trips in every form, sizes as documented, and damage refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aligner.reshard.message.delta import MASK, OFFSETS, apply, encode, size

BITS = {2: torch.int16, 4: torch.int32}


def line(elements: int, itemsize: int, seed: int = 0) -> Tensor:
    low, high = torch.iinfo(BITS[itemsize]).min, torch.iinfo(BITS[itemsize]).max
    return torch.randint(low, high, (elements,), generator=torch.Generator().manual_seed(seed), dtype=BITS[itemsize])


def touched(before: Tensor, changed: int) -> Tensor:
    """`changed` elements at random places differ, by any bits."""
    now = before.clone()
    draw = torch.Generator().manual_seed(changed)
    place = torch.randperm(len(now), generator=draw)[:changed]
    flips = torch.randint(1, torch.iinfo(now.dtype).max, (changed,), generator=draw, dtype=now.dtype)
    now[place] ^= flips
    return now


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 1000, 65_536, 65_537, 200_001])
def test_round_trip(elements: int, itemsize: int) -> None:
    before = line(elements, itemsize)
    for changed in sorted(
        {0, min(1, elements), elements // 100, elements // 17, elements // 5, elements // 2, elements}
    ):
        now = touched(before, changed)
        delta = encode(now, before)
        shortest = min(size(form, elements, changed, itemsize) for form in (MASK, OFFSETS))
        if shortest >= now.nbytes:
            assert delta is None
            continue
        assert delta is not None and delta.numel() == shortest
        onto = before.clone()
        assert apply(delta, onto) == changed == int((now != before).sum())
        assert torch.equal(onto, now)


@pytest.mark.parametrize(("changed", "form", "expected"), [
    # 131,072 elements of 2 bytes: two blocks. Header 32; offsets 8 + 2 x 1000 + 2 x 1000.
    (1000, OFFSETS, 32 + 8 + 2000 + 2000),
    # A bit each is 16,384 bytes, less than 2 bytes for each of 10,000.
    (10_000, MASK, 32 + 16_384 + 20_000),
    # 1 / 16 of the bytes for the mask, and the header: from there on everything is shorter.
    (122_800, MASK, 32 + 16_384 + 245_600),
    (122_880, None, None),
    (131_072, None, None),
])  # fmt: skip
def test_the_shortest_form_by_hand(changed: int, form: int | None, expected: int | None) -> None:
    before = line(131_072, 2)
    delta = encode(touched(before, changed), before)
    assert (form, expected) == (None, None) if delta is None else (int(delta[0]), delta.numel()) == (form, expected)


def test_the_mask_by_hand() -> None:
    """Elements 0, 3 and 9 of 64: bits 0 and 3 of the first byte, bit 1 of the second; then their values."""
    before = torch.zeros(64, dtype=torch.int16)
    now = before.clone()
    now[[0, 3, 9]] = torch.tensor([5, 6, -7], dtype=torch.int16)
    delta = encode(now, before)
    assert delta is not None
    assert delta[:32].view(torch.int64).tolist() == [MASK, 64, 2, 3]
    assert delta[32:40].tolist() == [0b00001001, 0b10, 0, 0, 0, 0, 0, 0]
    assert delta[40:46].view(torch.int16).tolist() == [5, 6, -7]


def test_nan_equals_itself_and_negative_zero_is_not_zero() -> None:
    before = torch.tensor([float("nan"), 0.0, 1.0] * 100)
    now = before.clone()
    now[1] = -0.0
    delta = encode(now.view(torch.int32), before.view(torch.int32))
    assert delta is not None
    assert apply(delta, before.view(torch.int32)) == 1
    assert torch.equal(before.view(torch.int32), now.view(torch.int32))


def test_a_longer_buffer_is_read_and_damage_refused() -> None:
    before = line(1000, 4)
    now = touched(before, 50)
    delta = encode(now, before)
    assert delta is not None
    onto = before.clone()
    apply(torch.cat((delta, delta.new_full((64,), 255))), onto)
    assert torch.equal(onto, now)
    with pytest.raises(RuntimeError, match="not a delta of 999 elements of 4 bytes"):
        apply(delta, onto[:999])
    with pytest.raises(RuntimeError, match="1000 elements of 4 bytes, 50 of them changed, in 100 bytes"):
        apply(delta[:100], onto)
    for place, wrong in ((0, 7), (24, 200)):
        harmed = delta.clone()
        harmed[place] = wrong
        with pytest.raises(RuntimeError, match="not a delta"):
            apply(harmed, onto)
