"""Token weights: the three means by hand, and a sum that does not depend on how the global batch is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.objective.reduction import Mean, token_weights

KINDS: tuple[Mean, ...] = ("token_mean", "sequence_mean", "fixed")
# Three rows with 3, 1 and 0 trained tokens, not contiguous, after prompts of unequal length.
MASK_BT = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
LOSS_BT = torch.tensor([[9, 1, 9, 2, 6], [9, 9, 5, 9, 9], [9, 9, 9, 9, 9]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_mean", (1 + 2 + 6 + 5) / 4),
        ("sequence_mean", ((1 + 2 + 6) / 3 + 5 / 1 + 0) / 3),  # the empty row is one of the three
        ("fixed", (1 + 2 + 6 + 5) / (8 * 3)),
    ],
)
def test_means_by_hand(kind: Mean, expected: float) -> None:
    weight_BT = token_weights(MASK_BT, kind, total_tokens=4, total_rows=3, fixed_length=8, dtype=torch.float64)
    assert (weight_BT * LOSS_BT).sum().item() == pytest.approx(expected, abs=1e-15)
    assert weight_BT[~MASK_BT].tolist() == [0.0] * 11


def test_weights_by_hand() -> None:
    # sequence_mean: 1 / (3 tokens * 3 rows) in row 0 and 1 / (1 * 3) in row 1.
    weight_BT = token_weights(MASK_BT, "sequence_mean", total_tokens=4, total_rows=3, dtype=torch.float64)
    ninth, third = 1 / 9, 1 / 3
    expected = [[0, ninth, 0, ninth, ninth], [0, 0, third, 0, 0], [0, 0, 0, 0, 0]]
    torch.testing.assert_close(weight_BT, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-16)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(KINDS), rows=st.integers(1, 12), length=st.integers(1, 9))
def test_any_cut_gives_the_same_total(data: st.DataObject, kind: Mean, rows: int, length: int) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    # Every row goes to some microbatch of some shard; which one is arbitrary, and a microbatch may be empty.
    owner_B = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    mask_BT = torch.tensor(bits).view(rows, length)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    loss_BT = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    totals = {"total_tokens": int(mask_BT.sum()), "total_rows": rows, "fixed_length": 7}

    def total(mask: Tensor, loss: Tensor) -> float:
        return float((token_weights(mask, kind, **totals, dtype=torch.float64) * loss).sum())

    whole = total(mask_BT, loss_BT)
    cut = sum(total(mask_BT[owner_B == owner], loss_BT[owner_B == owner]) for owner in range(5))
    assert cut == pytest.approx(whole, rel=0, abs=1e-12)
    assert whole == pytest.approx(naive_mean(mask_BT, loss_BT, kind, fixed_length=7), rel=0, abs=1e-12)


def naive_mean(mask_BT: Tensor, loss_BT: Tensor, kind: Mean, *, fixed_length: int) -> float:
    rows = [
        [loss for loss, trained in zip(losses, mask, strict=True) if trained]
        for losses, mask in zip(loss_BT.tolist(), mask_BT.tolist(), strict=True)
    ]
    if kind == "sequence_mean":
        return math.fsum(math.fsum(row) / len(row) for row in rows if row) / len(rows)
    tokens = math.fsum(loss for row in rows for loss in row)
    if kind == "fixed":
        return tokens / (fixed_length * len(rows))
    return tokens / max(sum(len(row) for row in rows), 1)


def test_padding_changes_nothing() -> None:
    """Microbatches are padded to their own longest row, so a weight must not depend on T."""
    padded_BT = torch.nn.functional.pad(MASK_BT, (0, 4))
    for kind in KINDS:
        weight_BT = token_weights(MASK_BT, kind, total_tokens=4, total_rows=3, fixed_length=8)
        wide_BT = token_weights(padded_BT, kind, total_tokens=4, total_rows=3, fixed_length=8)
        assert torch.equal(wide_BT[:, :5], weight_BT) and not wide_BT[:, 5:].any()
        assert weight_BT.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_weighs_zero_and_a_wrong_count_is_nan(kind: Mean) -> None:
    nothing_BT = torch.zeros(2, 3, dtype=torch.bool)
    assert not token_weights(nothing_BT, kind, total_tokens=0, total_rows=0, fixed_length=8).any()
    weight_BT = token_weights(MASK_BT, kind, total_tokens=0, total_rows=0, fixed_length=8)
    assert weight_BT[MASK_BT].isnan().all() and not weight_BT[~MASK_BT].any()


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="reduction='mean' is unknown; use one of token_mean, sequence_mean, fixed"):
        token_weights(MASK_BT, "mean", total_tokens=4, total_rows=3)  # type: ignore[arg-type]
    for fixed_length in (None, 0, -1, math.nan):
        with pytest.raises(ValueError, match="must be positive for reduction=fixed"):
            token_weights(MASK_BT, "fixed", total_tokens=4, total_rows=3, fixed_length=fixed_length)
    with pytest.raises(AssertionError, match="must be bool"):
        token_weights(MASK_BT.float(), "token_mean", total_tokens=4, total_rows=3)
    with pytest.raises(AssertionError, match=r"must be \[B, T\]"):
        token_weights(MASK_BT[0], "token_mean", total_tokens=4, total_rows=3)
