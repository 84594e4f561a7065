"""The reward model's loss by hand, against TRL, finite differences, and with pairs left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from aligner.objective.reward_model import bradley_terry

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl

F64 = torch.float64


def test_by_hand() -> None:
    # 2 - 0.5 = 1.5: ln(1 + e^-1.5) = 0.20141327798275246. With a margin of 0.5: ln(1 + e^-1) = 0.31326168751822286.
    # Centred: + 0.01 * 2.5^2 = 0.0625. The second pair is turned round: 1 - 3 = -2, ln(1 + e^2) = 2.126928011042972.
    score_B = torch.tensor([2.0, 0.5, 3.0, 1.0], dtype=F64, requires_grad=True)
    preference_B = torch.tensor([1.0, -1.0, -1.0, 1.0])
    loss_B, metrics = bradley_terry(score_B, preference_B=preference_B)
    assert loss_B.tolist() == pytest.approx([0.20141327798275246] * 2 + [2.126928011042972] * 2, abs=1e-15)
    assert {name: value_B.tolist() for name, value_B in metrics.items()} == {
        "chosen_reward": [2.0, 2.0, 1.0, 1.0], "rejected_reward": [0.5, 0.5, 3.0, 3.0],
        "margin": [1.5, 1.5, -2.0, -2.0], "pair_accuracy": [1.0, 1.0, 0.0, 0.0], "score": [2.0, 0.5, 3.0, 1.0],
    }  # fmt: skip
    (gradient_B,) = torch.autograd.grad(loss_B.mean(), score_B)
    # Of the mean over two pairs: -sigmoid(-1.5) / 2 and sigmoid(2) / 2.
    half, other = 0.18242552380635635 / 2, 0.8807970779778823 / 2
    assert gradient_B.tolist() == pytest.approx([-half, half, other, -other], abs=1e-15)
    margin_B = torch.tensor([0.5, 0.5, 0.0, 0.0])
    loss_B, _ = bradley_terry(score_B[:2], margin_B=margin_B[:2], centre_coef=0.01)
    assert loss_B.tolist() == pytest.approx([0.31326168751822286 + 0.0625] * 2, abs=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("centre", [None, 0.02])
@pytest.mark.parametrize("margins", [False, True])
def test_against_trl(trl: Trl, margins: bool, centre: float | None, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    score_B = (2 * torch.randn(10, generator=generator, dtype=dtype)).requires_grad_()
    margin_P = torch.rand(5, generator=generator, dtype=dtype) if margins else None
    theirs, their_metrics = trl.reward_model(score_B, margin_P, centre)
    margin_B = None if margin_P is None else margin_P.repeat_interleave(2)
    loss_B, metrics = bradley_terry(score_B, margin_B=margin_B, centre_coef=centre or 0.0)
    torch.testing.assert_close(loss_B.mean(), theirs, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(loss, score_B)[0] for loss in (loss_B.mean(), theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)
    for name, their_name in (("pair_accuracy", "accuracy"), ("margin", "margin"), ("score", "mean_reward")):
        assert metrics[name].mean().item() == pytest.approx(their_metrics[their_name], abs=tolerance)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_pairs_left_out(garbage: float) -> None:
    score_B = torch.tensor([garbage, 1.0, 1.0, 1.0, 0.0, garbage], requires_grad=True)
    mask_BT = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 1], [1, 1], [1, 1]], dtype=torch.bool)
    preference_B = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    margin_B = torch.tensor([0, 0, 0, 0, garbage, garbage])
    loss_B, metrics = bradley_terry(score_B, mask_BT=mask_BT, preference_B=preference_B, margin_B=margin_B)
    ln2 = math.log(2)
    assert loss_B.tolist() == pytest.approx([0, 0, ln2, ln2, 0, 0])
    assert metrics["score"].tolist() == [0, 0, 1, 1, 0, 0]
    (gradient_B,) = torch.autograd.grad(loss_B.sum(), score_B)
    assert gradient_B.tolist() == [0, 0, -1, 1, 0, 0]
    assert bradley_terry.rows_together == 2


def test_gradients_against_finite_differences() -> None:
    score_B = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    margin_B = torch.ones(6, dtype=F64)
    assert torch.autograd.gradcheck(lambda s: bradley_terry(s, margin_B=margin_B, centre_coef=0.1)[0], score_B)


@pytest.mark.parametrize(
    ("score_B", "wrong", "error"),
    [
        (torch.zeros(3), {}, AssertionError),
        (torch.zeros(2, 1), {}, AssertionError),
        (torch.zeros(2, dtype=torch.bfloat16), {}, AssertionError),
        (torch.zeros(2), {"margin_B": torch.zeros(1)}, AssertionError),
        (torch.zeros(2), {"centre_coef": -1.0}, ValueError),
    ],
)
def test_mistakes_are_refused(score_B: torch.Tensor, wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        bradley_terry(score_B, **wrong)
