"""GAE by hand, against its definition as a double sum, and what it is at both ends; the critic's loss by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligner.objective.values import clipped_value_loss, gae

F64, NAN = torch.float64, math.nan
MASK_BT = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("garbage", [0.0, NAN, math.inf])
def test_gae_by_hand(garbage: float) -> None:
    reward_BT = torch.tensor([[0, 1, 0, 2, 0], [0, 0, 0, 0, 8], [0] * 5], dtype=F64).masked_fill(~MASK_BT, garbage)
    value_BT = torch.tensor([[0, 4, 0, 6, 0], [0, 0, 1, 2, 4], [0] * 5], dtype=F64).masked_fill(~MASK_BT, -garbage)
    # gamma = lam = 1/2. Row 0: delta 1 + 6/2 - 4 = 0 and 2 - 6 = -4; A = 0 - 4/4 = -1 and -4; R = 3 and 2.
    # Row 1: 8 - 4 = 4; 0 + 2 - 2 = 0, A = 1; 0 + 1 - 1 = 0, A = 1/4.
    advantage_BT, return_BT = gae(reward_BT, value_BT, MASK_BT, gamma=0.5, lam=0.5)
    assert advantage_BT.tolist() == [[0, -1, 0, -4, 0], [0, 0, 0.25, 1, 4], [0] * 5]
    assert return_BT.tolist() == [[0, 3, 0, 2, 0], [0, 0, 1.25, 3, 8], [0] * 5]
    # Row 0 was cut off where V is 8: delta of its last token 2 + 4 - 6 = 0, and so is the one before.
    bootstrap_B = torch.tensor([8.0, 0.0, 5.0])
    advantage_BT, _ = gae(reward_BT, value_BT, MASK_BT, gamma=0.5, lam=0.5, bootstrap_B=bootstrap_B)
    assert advantage_BT.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0.25, 1, 4], [0] * 5]


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    gamma=st.sampled_from([0.0, 0.97, 1.0]),
    lam=st.sampled_from([0.0, 0.9, 1.0]),
    rows=st.integers(1, 4),
    length=st.integers(1, 7),
)
def test_gae_is_its_definition(data: st.DataObject, gamma: float, lam: float, rows: int, length: int) -> None:
    """Equation 16 as it stands: A_t = sum over l of (gamma lam)^l delta_(t + l), over a row's trained tokens alone."""
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask_BT = torch.tensor(bits).view(rows, length)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    reward_BT, value_BT = (torch.randn(rows, length, generator=generator, dtype=F64) for _ in range(2))
    bootstrap_B = torch.randn(rows, generator=generator, dtype=F64)
    advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    assert not advantage_BT[~mask_BT].any() and not return_BT[~mask_BT].any()
    for b in range(rows):
        r, v = reward_BT[b][mask_BT[b]].tolist(), [*value_BT[b][mask_BT[b]].tolist(), bootstrap_B[b].item()]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        expected = [math.fsum((gamma * lam) ** k * d for k, d in enumerate(delta[i:])) for i in range(len(r))]
        assert advantage_BT[b][mask_BT[b]].tolist() == pytest.approx(expected, abs=1e-12)
        learned = [a + value for a, value in zip(expected, v[:-1], strict=True)]
        assert return_BT[b][mask_BT[b]].tolist() == pytest.approx(learned, abs=1e-12)
    # A row's numbers are its own: any shard of the batch has the same.
    rows_B = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    part_BT, _ = gae(
        reward_BT[rows_B], value_BT[rows_B], mask_BT[rows_B], gamma=gamma, lam=lam, bootstrap_B=bootstrap_B[rows_B]
    )
    assert torch.equal(part_BT, advantage_BT[rows_B])


def test_the_ends_of_lambda() -> None:
    """lam = 1: what is still to come less V. lam = 0: one step's error. A critic that is right leaves no advantage."""
    reward_BT = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64)
    value_BT, mask_BT = torch.tensor([[3.0, 5.0, 7.0]], dtype=F64), torch.ones(1, 3, dtype=torch.bool)
    assert gae(reward_BT, value_BT, mask_BT, lam=1.0)[0].tolist() == [[7 - 3, 6 - 5, 4 - 7]]
    assert gae(reward_BT, value_BT, mask_BT, lam=0.0)[0].tolist() == [[1 + 5 - 3, 2 + 7 - 5, 4 - 7]]
    right_BT = torch.tensor([[7.0, 6.0, 4.0]], dtype=F64)
    for lam in (0.0, 0.5, 1.0):
        advantage_BT, return_BT = gae(reward_BT, right_BT, mask_BT, lam=lam)
        assert not advantage_BT.any() and torch.equal(return_BT, right_BT)
    advantage_BT, return_BT = gae(reward_BT.float(), value_BT.float().requires_grad_(), mask_BT)
    assert advantage_BT.dtype == return_BT.dtype == torch.float32 and not advantage_BT.requires_grad


# --- the critic's loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rollout", "target", "loss", "gradient", "clipped"),
    # clip 0.5.
    [
        (2.0, 2.0, 3.0, 0.5, -1.0, 0),  # 1/2 (2 - 3)^2
        (2.25, 2.0, 3.0, 0.28125, -0.75, 0),  # inside the clip: 1/2 0.75^2
        (2.75, 2.0, 3.0, 0.125, 0.0, 1),  # moved too far towards R: counted as 2.5, no gradient
        (1.0, 2.0, 3.0, 2.0, -2.0, 0),  # moved too far away from R: pushed back, 1/2 2^2
        (5.0, 2.0, 3.0, 2.0, 2.0, 0),  # beyond R by more than the clipped one is short of it
    ],
)
def test_value_loss_by_hand(
    value: float, rollout: float, target: float, loss: float, gradient: float, clipped: int
) -> None:
    value_BT = torch.tensor([[value]], dtype=F64, requires_grad=True)
    loss_BT, metrics = clipped_value_loss(
        value_BT, mask_BT=torch.ones(1, 1, dtype=torch.bool), rollout_value_BT=torch.tensor([[rollout]]),
        return_BT=torch.tensor([[target]]), clip=0.5,
    )  # fmt: skip
    (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), value_BT)
    assert (loss_BT.item(), gradient_BT.item()) == (loss, gradient)
    assert {name: metric.item() for name, metric in metrics.items()} == {
        "value": value, "return": target, "error": abs(value - target), "value_clip_fraction": clipped
    }  # fmt: skip


def value_batch(garbage: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randn(3, 5, generator=generator, dtype=F64).masked_fill(~MASK_BT, garbage) for _ in range(3)]
    names = ("value_BT", "rollout_value_BT", "return_BT")
    return dict(zip(names, batch, strict=True)) | {"mask_BT": MASK_BT}


@pytest.mark.parametrize("garbage", [NAN, math.inf])
@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_value_loss_against_plain_torch_and_garbage(garbage: float, clip: float) -> None:
    results = []
    for batch in (value_batch(0.0), value_batch(garbage)):
        batch["value_BT"].requires_grad_()
        loss_BT, metrics = clipped_value_loss(**batch, clip=clip)
        (gradient_BT,) = torch.autograd.grad(loss_BT.sum(), batch["value_BT"])
        results.append({"loss": loss_BT, "gradient": gradient_BT, **metrics})
    for name, value_BT in results[1].items():
        assert torch.equal(value_BT, results[0][name]) and not value_BT[~MASK_BT].any(), name
    if clip == math.inf:
        expected_BT = torch.nn.functional.mse_loss(batch["value_BT"], batch["return_BT"], reduction="none") / 2
        torch.testing.assert_close(results[1]["loss"][MASK_BT], expected_BT[MASK_BT], rtol=0, atol=1e-15)
        assert not results[1]["value_clip_fraction"].any()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"clip": 0.0}, ValueError),
        ({"clip": NAN}, ValueError),
        ({"return_BT": torch.zeros(3)}, AssertionError),
        ({"value_BT": torch.zeros(3, 5, dtype=torch.bfloat16)}, AssertionError),
    ],
)
def test_value_loss_mistakes(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        clipped_value_loss(**{**value_batch(0.0), **wrong})


def test_gae_mistakes() -> None:
    zeros_BT = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"lam=1.1 must lie in \[0, 1\]"):
        gae(zeros_BT, zeros_BT, MASK_BT, lam=1.1)
    with pytest.raises(ValueError, match=r"gamma=nan must lie in \[0, 1\]"):
        gae(zeros_BT, zeros_BT, MASK_BT, gamma=NAN)
    with pytest.raises(AssertionError):
        gae(zeros_BT[:2], zeros_BT, MASK_BT)
    with pytest.raises(AssertionError):
        gae(zeros_BT, zeros_BT, MASK_BT, bootstrap_B=torch.zeros(2))
