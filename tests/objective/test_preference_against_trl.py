"""The losses on preferences against TRL's, values, gradients and metrics, in both precisions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from aligner.objective.masked import row_sums
from aligner.objective.preference import dpo, ipo, kto, orpo, robust_dpo, simpo
from tests.objective.ragged_pairs import ragged

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl

F64 = torch.float64
DTYPES = [(F64, 1e-6), (torch.float32, 1e-5)]


def same(ours: Any, theirs: Any, leaf: Tensor, tolerance: float) -> None:
    """Values, and gradients by the policy's log-probabilities, of two scalar losses."""
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)


def same_metrics(metrics: dict[str, Tensor], theirs: dict[str, float], tolerance: float) -> None:
    names = {
        "chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected", "margin": "rewards/margins",
        "pair_accuracy": "rewards/accuracies", "chosen_logp": "logps/chosen", "rejected_logp": "logps/rejected",
    }  # fmt: skip
    for name, their_name in names.items():
        assert metrics[name].mean().item() == pytest.approx(theirs[their_name], abs=tolerance, rel=tolerance), name


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "kind", "smoothing"),
    [
        (dpo, "sigmoid", 0.0),
        (functools.partial(dpo, log_ratio="token_mean"), "sigmoid_norm", 0.0),
        (functools.partial(robust_dpo, label_smoothing=0.2), "robust", 0.2),
        (ipo, "ipo", 0.0),
    ],
)
def test_against_trls_dpo(
    trl: Trl, loss: Any, kind: str, smoothing: float, seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    batch = ragged(seed, dtype=dtype)
    loss_B, metrics = loss(**batch, beta=0.3)
    theirs, their_metrics = trl.dpo(
        batch["policy_logp_BT"], batch["mask_BT"], batch["reference_sum_B"],
        loss_types=[kind], beta=0.3, label_smoothing=smoothing,
    )  # fmt: skip
    same(loss_B.mean(), theirs, batch["policy_logp_BT"], tolerance)
    if kind in ("sigmoid", "robust"):  # TRL reports the sums whatever its loss compares
        same_metrics(metrics, their_metrics, 10 * tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_nll_against_trl(trl: Trl, seed: int) -> None:
    """A pair at a time: TRL's mean is over the batch's tokens, ours over each response's, as in the paper."""
    batch = ragged(seed, pairs=1)
    loss_B, _ = dpo(**batch, beta=0.3, nll_coef=0.7)
    theirs, _ = trl.dpo(
        batch["policy_logp_BT"], batch["mask_BT"], batch["reference_sum_B"],
        loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.3,
    )  # fmt: skip
    same(loss_B.mean(), theirs, batch["policy_logp_BT"], 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_smoothing_and_simpo_against_trls_cpo(trl: Trl, smoothing: float, dtype: torch.dtype, tolerance: float) -> None:
    batch = ragged(5, dtype=dtype)
    logp_BT, mask_BT = batch["policy_logp_BT"], batch["mask_BT"]
    sum_B = torch.where(mask_BT, logp_BT, 0.0).sum(1)
    # CPO is DPO without a reference, so that of differences it is DPO.
    d_B = sum_B - batch["reference_sum_B"]
    theirs_P, _, _ = trl.cpo(d_B[0::2], d_B[1::2], loss_type="sigmoid", beta=0.3, label_smoothing=smoothing)
    loss_B, _ = dpo(**batch, beta=0.3, label_smoothing=smoothing)
    torch.testing.assert_close(loss_B[0::2], theirs_P, rtol=tolerance, atol=tolerance)
    same(loss_B.mean(), theirs_P.mean(), logp_BT, tolerance)

    mean_B = torch.where(mask_BT, logp_BT, 0.0).sum(1) / mask_BT.sum(1)
    theirs_P, chosen_P, rejected_P = trl.cpo(
        mean_B[0::2], mean_B[1::2], loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing
    )
    loss_B, metrics = simpo(logp_BT, mask_BT=mask_BT, beta=2.0, gamma=0.7, label_smoothing=smoothing)
    torch.testing.assert_close(loss_B[0::2], theirs_P, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(metrics["margin"][0::2], chosen_P - rejected_P, rtol=tolerance, atol=tolerance)
    same(loss_B.mean(), theirs_P.mean(), logp_BT, tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_orpo_against_trl(trl: Trl, seed: int) -> None:
    """From the logits on; chosen responses of one length, where TRL's mean over the batch's tokens is a mean over rows.

    TRL takes the odds in float32 whatever it is given.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randn(6, 6, 11, generator=generator, dtype=F64, requires_grad=True)
    tokens_BT = torch.randint(1, 11, (6, 6), generator=generator)
    mask_BT = torch.arange(6) < torch.tensor([5, 3, 5, 6, 5, 2])[:, None]
    mask_BT[:, 0] = False
    theirs, their_metrics = trl.orpo(logits_BTV, tokens_BT, mask_BT, beta=0.4)
    logp_BT = logits_BTV[:, :-1].log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
    loss_B, metrics = orpo(logp_BT, mask_BT=mask_BT[:, 1:], beta=0.4)
    same(loss_B.mean(), theirs, logits_BTV, 1e-6)
    same_metrics(metrics, their_metrics, 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_kto_against_trl(trl: Trl, seed: int, dtype: torch.dtype, tolerance: float) -> None:
    batch, other = ragged(seed, dtype=dtype), ragged(seed + 100, dtype=dtype)
    label_B = torch.tensor([True, False, False, True, True, seed % 2 == 0])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    # Among the seeds there are divergences above 0 and ones that are cut off there.
    other_sum_B = row_sums(other["policy_logp_BT"].detach(), batch["mask_BT"]).to(dtype) + (1, -2)[seed % 2]
    theirs, their_metrics = trl.kto(
        batch["policy_logp_BT"], batch["mask_BT"], batch["reference_sum_B"], label_B,
        other["policy_logp_BT"].detach(), other_sum_B, beta=0.3, **weights,
    )  # fmt: skip
    loss_B, metrics = kto(**batch, label_B=label_B, kl=their_metrics["kl"], beta=0.3, **weights)
    same(loss_B.mean(), theirs, batch["policy_logp_BT"], tolerance)
    good = metrics["desirable"].mean()
    chosen = (metrics["reward"].mean() + metrics["margin"].mean()) / 2 / good
    assert chosen.item() == pytest.approx(their_metrics["rewards/chosen"], abs=10 * tolerance)
    assert (their_metrics["kl"] > 0) == bool(seed % 2)
