"""Losses on preferences against numbers worked by hand, finite differences, garbage padding, and any order of pairs."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.objective.masked import row_sums
from aligner.objective.preference import dpo, ipo, kto, orpo, reference_point, robust_dpo, simpo
from tests.objective.ragged_pairs import ragged

F64 = torch.float64
PAIR_LOSSES = (dpo, robust_dpo, ipo, orpo, simpo)
WITH_REFERENCE = (dpo, robust_dpo, ipo)
METRICS = {"chosen_reward", "rejected_reward", "margin", "pair_accuracy", "chosen_logp", "rejected_logp"}


def inputs(loss: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch `loss` takes."""
    return batch if loss in WITH_REFERENCE else {name: batch[name] for name in ("policy_logp_BT", "mask_BT")}


def one_pair(
    loss: Any, chosen: list[float], rejected: list[float], reference: tuple[float, float], **kwargs: Any
) -> Any:
    """Loss, its derivative by each chosen and each rejected token, and metrics, of one pair without a prompt."""
    width = max(len(chosen), len(rejected))
    rows = [row + [math.nan] * (width - len(row)) for row in (chosen, rejected)]
    logp_BT = torch.tensor(rows, dtype=F64, requires_grad=True)
    if loss in WITH_REFERENCE:
        kwargs["reference_sum_B"] = torch.tensor(reference, dtype=F64)
    loss_B, metrics = loss(logp_BT, mask_BT=~logp_BT.isnan(), **kwargs)
    assert loss_B[0] == loss_B[1]
    (gradient_BT,) = torch.autograd.grad(loss_B.mean(), logp_BT)
    by_token = (gradient_BT[0, 0].item(), gradient_BT[1, 0].item())
    return loss_B[0].item(), by_token, {name: value_B[0].item() for name, value_B in metrics.items()}


# --- by hand -------------------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    # log p(w) = -1 - 2 = -3 against -5: d_w = 2. log p(l) = -4 against -3: d_l = -1. z = 0.5 (2 + 1) = 1.5.
    # -log sigmoid(1.5) = ln(1 + e^-1.5) = 0.20141327798275246. d/dw = -beta sigmoid(-z) = -0.5 * 0.18242552380635635.
    loss, (by_chosen, by_rejected), metrics = one_pair(dpo, [-1.0, -2.0], [-4.0], (-5.0, -3.0), beta=0.5)
    assert loss == pytest.approx(0.20141327798275246, abs=1e-15)
    assert by_chosen == pytest.approx(-0.09121276190317818, abs=1e-15)
    assert by_rejected == pytest.approx(0.09121276190317818, abs=1e-15)
    assert metrics == {
        "chosen_reward": 1.0, "rejected_reward": -0.5, "margin": 1.5, "pair_accuracy": 1.0,
        "chosen_logp": -3.0, "rejected_logp": -4.0,
    }  # fmt: skip


def test_dpo_variants_by_hand() -> None:
    pair = ([-1.0, -2.0], [-4.0], (-5.0, -3.0))
    # With z = 1.5: -log sigmoid(-z) = 1.5 + 0.20141327798275246. Conservative with 0.1: 0.9 and 0.1 of them.
    right, wrong = 0.20141327798275246, 1.7014132779827524
    loss, _, _ = one_pair(dpo, *pair, beta=0.5, label_smoothing=0.1)
    assert loss == pytest.approx(0.9 * right + 0.1 * wrong, abs=1e-15)
    loss, _, _ = one_pair(robust_dpo, *pair, beta=0.5, label_smoothing=0.1)
    assert loss == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8, abs=1e-15)
    # Over tokens: m(d_w) = 2/2, m(d_l) = -1/1: z = 0.5 * 2 = 1, ln(1 + e^-1) = 0.31326168751822286.
    loss, _, _ = one_pair(dpo, *pair, beta=0.5, log_ratio="token_mean")
    assert loss == pytest.approx(0.31326168751822286, abs=1e-15)
    # The mean log-probability of the chosen one is -1.5.
    loss, _, _ = one_pair(dpo, *pair, beta=0.5, nll_coef=0.2)
    assert loss == pytest.approx(right + 0.2 * 1.5, abs=1e-15)


def test_robust_dpo_is_the_true_labels_dpo_in_the_mean() -> None:
    """0.8 of the labels as they are and 0.2 of them flipped have the loss of none flipped: what the division is for."""
    pair, flipped = ([-1.0], [-3.0], (-2.0, -2.5)), ([-3.0], [-1.0], (-2.5, -2.0))
    noisy = [one_pair(robust_dpo, *rows, beta=1.0, label_smoothing=0.2)[0] for rows in (pair, flipped)]
    assert 0.8 * noisy[0] + 0.2 * noisy[1] == pytest.approx(one_pair(dpo, *pair, beta=1.0)[0], abs=1e-15)


def test_ipo_by_hand() -> None:
    # Over tokens 1 + 1 = 2 and 1 / (2 * 0.5) = 1: 1. Its derivative by a token of the chosen: 2 * 1 / 2 tokens.
    loss, by_token, metrics = one_pair(ipo, [-1.0, -2.0], [-4.0], (-5.0, -3.0), beta=0.5)
    assert (loss, by_token) == (1.0, (1.0, -2.0))
    assert metrics["margin"] == 1.0 and metrics["chosen_reward"] == 0.5
    # As sums: 2 + 1 = 3, less 1: 4.
    assert one_pair(ipo, [-1.0, -2.0], [-4.0], (-5.0, -3.0), beta=0.5, log_ratio="sum")[0] == 4.0


def test_orpo_by_hand() -> None:
    # Mean log-probabilities -ln 2 and -ln 4: odds 1 and 1/3, ratio 3; -log sigmoid(ln 3) = ln(4/3).
    loss, _, metrics = one_pair(orpo, [-2 * math.log(2), 0.0], [-math.log(4)], (0, 0), beta=0.25)
    assert loss == pytest.approx(math.log(2) + 0.25 * math.log(4 / 3), abs=1e-15)
    assert metrics["chosen_logp"] == pytest.approx(-math.log(2)) and metrics["pair_accuracy"] == 1.0


def test_simpo_by_hand() -> None:
    # Means -1.5 and -4: 2 * 2.5 - 1 = 4; ln(1 + e^-4) = 0.01814992791780974.
    loss, _, metrics = one_pair(simpo, [-1.0, -2.0], [-4.0], (0, 0), beta=2.0, gamma=1.0)
    assert loss == pytest.approx(0.01814992791780974, abs=1e-15)
    assert metrics == {
        "chosen_reward": -3.0, "rejected_reward": -8.0, "margin": 5.0, "pair_accuracy": 1.0,
        "chosen_logp": -1.5, "rejected_logp": -4.0,
    }  # fmt: skip
    with_nll, _, same = one_pair(simpo, [-1.0, -2.0], [-4.0], (0, 0), beta=2.0, gamma=1.0, nll_coef=0.2)
    assert with_nll == pytest.approx(0.01814992791780974 + 0.2 * 1.5, abs=1e-15)
    assert same == metrics


def test_kto_by_hand() -> None:
    # d = -3 + 5 = 2 and -4 + 3 = -1, kl 0.5, beta 2. Good: 1 - sigmoid(3) = 0.04742587317756678, twice.
    # Bad: 1 - sigmoid(2 * 1.5) likewise, three times.
    logp_BT = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]], dtype=F64, requires_grad=True)
    loss_B, metrics = kto(
        logp_BT, mask_BT=~logp_BT.isnan(), label_B=torch.tensor([True, False]),
        reference_sum_B=torch.tensor([-5.0, -3.0], dtype=F64), kl=0.5, beta=2.0,
        desirable_weight=2.0, undesirable_weight=3.0,
    )  # fmt: skip
    assert loss_B.tolist() == pytest.approx([2 * 0.04742587317756678, 3 * 0.04742587317756678], abs=1e-15)
    assert {name: value_B.tolist() for name, value_B in metrics.items()} == {
        "reward": [4.0, -2.0], "margin": [4.0, 2.0], "label_accuracy": [1.0, 1.0], "desirable": [1.0, 0.0],
        "logp": [-3.0, -4.0],
    }  # fmt: skip
    (gradient_BT,) = torch.autograd.grad(loss_B.sum(), logp_BT)
    # -2 beta s (1 - s) for a good one, where s (1 - s) = 0.04742587317756678 * 0.9525741268224334.
    slope = 0.04742587317756678 * 0.9525741268224334
    assert gradient_BT[0].tolist() == pytest.approx([-4 * slope, -4 * slope], abs=1e-15)
    assert gradient_BT[1].tolist() == pytest.approx([6 * slope, 0.0], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_first_loss_is_ln_2(dtype: torch.dtype) -> None:
    """Policy and reference being one model, at a length where float32 sums would differ by 1e-3."""
    logp_BT = -torch.rand(6, 4000, generator=torch.Generator().manual_seed(0), dtype=dtype) * 4
    mask_BT = torch.ones(6, 4000, dtype=torch.bool)
    batch = {"mask_BT": mask_BT, "reference_sum_B": row_sums(logp_BT, mask_BT)}
    ln2_B = torch.full((6,), math.log(2), dtype=dtype)
    for loss in (dpo, robust_dpo, functools.partial(dpo, label_smoothing=0.1), functools.partial(dpo, beta=5.0)):
        loss_B, metrics = loss(logp_BT, **batch)
        torch.testing.assert_close(loss_B, ln2_B, rtol=0, atol=1e-15 if dtype == F64 else 0)
        assert not metrics["margin"].any() and not metrics["pair_accuracy"].any()
    loss_B, _ = ipo(logp_BT, **batch, beta=0.5)
    assert loss_B.tolist() == [1.0] * 6
    loss_B, _ = kto(logp_BT, **batch, label_B=mask_BT[:, 0], kl=0.0)
    assert loss_B.tolist() == [0.5] * 6


# --- what a caller may rely on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_nothing_leaks_from_outside_the_mask_or_from_a_pair_left_out(loss: Any, garbage: float) -> None:
    clean, dirty = ragged(1, pairs=4), ragged(1, pairs=4)
    mask_BT = clean["mask_BT"].clone()
    mask_BT[6:] = False
    preference_B = torch.tensor([1, -1, 0, 0, -1, 1, 1, -1.0])
    with torch.no_grad():
        dirty["policy_logp_BT"][~mask_BT] = garbage
        dirty["policy_logp_BT"][2:4] = garbage
        dirty["reference_sum_B"][[2, 3, 6, 7]] = garbage
    results = []
    for batch in (clean, dirty):
        loss_B, metrics = loss(**inputs(loss, batch | {"mask_BT": mask_BT}), preference_B=preference_B)
        assert set(metrics) == METRICS and not any(value_B.requires_grad for value_B in metrics.values())
        (gradient_BT,) = torch.autograd.grad(loss_B.sum(), batch["policy_logp_BT"])
        results.append({"loss": loss_B, "gradient": gradient_BT, **metrics})
    for name, value in results[1].items():
        assert torch.equal(value, results[0][name]), name
        assert not value[[2, 3, 6, 7]].any(), name
    assert results[0]["loss"][[0, 1, 4, 5]].all() and not results[0]["gradient"][~mask_BT].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_nothing_leaks_into_kto(garbage: float) -> None:
    batch = ragged(1)
    batch["mask_BT"][2] = False
    with torch.no_grad():
        batch["policy_logp_BT"][~batch["mask_BT"]] = garbage
        batch["reference_sum_B"][2] = garbage
    loss_B, metrics = kto(**batch, label_B=torch.ones(6), kl=0.1)
    (gradient_BT,) = torch.autograd.grad(loss_B.sum(), batch["policy_logp_BT"])
    assert loss_B.isfinite().all() and gradient_BT.isfinite().all() and loss_B[2] == 0
    assert all(value_B.isfinite().all() and value_B[2] == 0 for value_B in metrics.values())


@settings(deadline=None, max_examples=60)
@given(data=st.data(), which=st.sampled_from(range(len(PAIR_LOSSES))), pairs=st.integers(1, 6))
def test_any_cut_between_pairs_and_any_order_in_them_is_the_same(data: st.DataObject, which: int, pairs: int) -> None:
    loss = PAIR_LOSSES[which]
    assert loss.rows_together == 2
    batch = inputs(loss, ragged(data.draw(st.integers(0, 1000)), pairs=pairs))
    whole_B, whole = loss(**batch)
    owner_P = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=pairs, max_size=pairs)))
    swap_P = torch.tensor(data.draw(st.lists(st.booleans(), min_size=pairs, max_size=pairs)))
    order_B = (torch.arange(2 * pairs).view(-1, 2) + torch.stack([swap_P, -1 * swap_P], 1)).flatten()
    sign_B = torch.where(swap_P[:, None], torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])).flatten()
    for owner in range(3):
        rows = (owner_P == owner).repeat_interleave(2)
        if rows.any():
            part = {name: value[order_B][rows] for name, value in batch.items()}
            loss_B, metrics = loss(**part, preference_B=sign_B[rows])
            torch.testing.assert_close(loss_B, whole_B[rows], rtol=0, atol=1e-12)
            for name, value_B in metrics.items():
                torch.testing.assert_close(value_B, whole[name][rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [*PAIR_LOSSES, functools.partial(dpo, label_smoothing=0.2, nll_coef=0.3)])
def test_gradients_against_finite_differences(loss: Any) -> None:
    batch = inputs(loss, ragged(2)) if loss in PAIR_LOSSES else ragged(2)
    rest = {name: value for name, value in batch.items() if name != "policy_logp_BT"}
    assert torch.autograd.gradcheck(lambda logp_BT: loss(logp_BT, **rest)[0], batch["policy_logp_BT"])


def test_orpo_is_finite_for_a_policy_that_is_certain() -> None:
    logp_BT = torch.zeros(2, 3, requires_grad=True)
    loss_B, _ = orpo(logp_BT, mask_BT=torch.ones(2, 3, dtype=torch.bool))
    (gradient_BT,) = torch.autograd.grad(loss_B.sum(), logp_BT)
    assert loss_B.isfinite().all() and gradient_BT.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "wrong", "message"),
    [
        (dpo, {"beta": 0.0}, "beta=0.0 must be more than 0"),
        (dpo, {"label_smoothing": 1.0}, "label_smoothing=1.0 must be 0 or more and less than 1"),
        (robust_dpo, {"label_smoothing": 0.5}, "less than 0.5"),
        (dpo, {"log_ratio": "mean"}, "log_ratio='mean' is unknown; use one of sum, token_mean"),
        (ipo, {"preference_B": torch.tensor([1, 1, 1, -1, 1, -1.0])}, r"a pair's preferences are \[1.0, 1.0\]"),
        (ipo, {"preference_B": torch.tensor([1, -1, 0, -1, 1, -1.0])}, r"are \[0.0, -1.0\]"),
        (kto, {"kl": -0.1, "label_B": torch.ones(6)}, "kl=-0.1 must be 0 or more"),
        (kto, {"kl": 0.0, "label_B": torch.ones(6), "desirable_weight": -1.0}, "desirable_weight=-1.0"),
    ],
)
def test_mistakes_are_named(loss: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**ragged(0), **wrong)


def test_an_odd_number_of_rows_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 rows are not complete pairs"):
        simpo(torch.zeros(3, 2), mask_BT=torch.ones(3, 2, dtype=torch.bool))


def test_kto_s_reference_point_by_hand() -> None:
    """(3 - 1 + 4) / 3 of the rows that have a token; a fourth has none, whatever stands there."""
    mask_BT = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    policy_B = torch.tensor([-2.0, -5.0, -100.0, -6.0], dtype=torch.float64)
    d_B = torch.tensor([3.0, -1.0, float("nan"), 4.0], dtype=torch.float64)
    assert reference_point(policy_B, policy_B - d_B, mask_BT) == pytest.approx(2.0)
    assert reference_point(policy_B, policy_B + d_B, mask_BT) == 0.0
    assert reference_point(policy_B, policy_B - d_B, torch.zeros(4, 2, dtype=torch.bool)) == 0.0
