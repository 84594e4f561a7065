"""The policy-gradient losses against TRL's, reduced as each of its reductions does, values and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from aligner.objective.losses import clipped_surrogate, reinforce, sequence_clipped_surrogate
from aligner.objective.reduction import Mean, token_weights

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl

F64 = torch.float64
DTYPES = [(F64, 1e-6), (torch.float32, 1e-5)]


def ragged(seed: int, dtype: torch.dtype, apart: float = 0.3) -> dict[str, Any]:
    """Six rows of unequal length; holes are where a tool spoke."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    mask_BT = torch.rand(6, 9, generator=generator) < 0.7
    mask_BT[:, 0] = True
    rollout_BT = -1 - normal(6, 9).abs()
    return {
        "policy_logp_BT": (rollout_BT + apart * normal(6, 9)).to(dtype).requires_grad_(),
        "rollout_logp_BT": rollout_BT.to(dtype),
        "reference_logp_BT": (rollout_BT + 0.5 * normal(6, 9)).to(dtype),
        "mask_BT": mask_BT,
        "advantage_B": normal(6).to(dtype),
    }


def reduced(loss_BT: Tensor, mask_BT: Tensor, kind: Mean) -> Tensor:
    totals = {"total_tokens": int(mask_BT.sum()), "total_rows": len(mask_BT), "fixed_length": 16}
    return (loss_BT * token_weights(mask_BT, kind, **totals, dtype=F64)).sum()


def same(ours: Tensor, theirs: Tensor, leaf: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "name"), [("sequence_mean", "grpo"), ("token_mean", "bnpo"), ("fixed", "dr_grpo")])
@pytest.mark.parametrize("extra", [{}, {"dual_clip": 1.5}, {"kl_coef": 0.2}, {"per_token": True}])
def test_grpo(
    trl: Trl, extra: dict[str, Any], kind: Mean, name: str, seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    batch = ragged(seed, dtype)
    settings = {"clip_low": 0.2, "clip_high": 0.28, **extra}
    advantage = batch["advantage_B"]
    if settings.pop("per_token", False):
        advantage = batch["advantage_BT"] = batch.pop("advantage_B")[:, None] * torch.linspace(-1, 2, 9).to(dtype)
    theirs, their_metrics = trl.grpo(
        batch["policy_logp_BT"], batch["rollout_logp_BT"], batch["mask_BT"], advantage, batch["reference_logp_BT"],
        loss_type=name, epsilon_low=0.2, epsilon_high=0.28, delta=settings.get("dual_clip"),
        beta=settings.get("kl_coef", 0.0), max_completion_length=16,
    )  # fmt: skip
    loss_BT, metrics = clipped_surrogate(**batch, **settings)
    same(reduced(loss_BT, batch["mask_BT"], kind), theirs, batch["policy_logp_BT"], tolerance)
    if "dual_clip" not in settings:  # TRL does not count what its upper bound clips
        mean = reduced(metrics["clip_fraction"], batch["mask_BT"], "token_mean").item()
        assert mean == pytest.approx(their_metrics["clip_ratio/region_mean"], abs=tolerance) and mean > 0


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_gspo(trl: Trl, kl_coef: float, seed: int, dtype: torch.dtype, tolerance: float) -> None:
    batch = ragged(seed, dtype)
    theirs, their_metrics = trl.grpo(
        batch["policy_logp_BT"], batch["rollout_logp_BT"], batch["mask_BT"], batch["advantage_B"],
        batch["reference_logp_BT"], importance_sampling_level="sequence", loss_type="grpo",
        epsilon_low=0.05, epsilon_high=0.06, beta=kl_coef,
    )  # fmt: skip
    loss_BT, metrics = sequence_clipped_surrogate(**batch, clip_low=0.05, clip_high=0.06, kl_coef=kl_coef)
    same(reduced(loss_BT, batch["mask_BT"], "sequence_mean"), theirs, batch["policy_logp_BT"], tolerance)
    mean = reduced(metrics["clip_fraction"], batch["mask_BT"], "sequence_mean").item()
    assert mean == pytest.approx(their_metrics["clip_ratio/region_mean"], abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_rloo(trl: Trl, seed: int, dtype: torch.dtype, tolerance: float) -> None:
    """On policy TRL's ratio of whole responses has a value of 1 and the gradient of the plain policy gradient."""
    batch = ragged(seed, dtype)
    logp_BT, mask_BT, advantage_B = (batch[name] for name in ("policy_logp_BT", "mask_BT", "advantage_B"))
    old_logp_B = (logp_BT.detach() * mask_BT).sum(1)
    theirs = trl.rloo(logp_BT, old_logp_B, mask_BT, advantage_B, clip=0.2)
    loss_BT, metrics = reinforce(logp_BT, mask_BT=mask_BT, advantage_B=advantage_B)
    weight_BT = token_weights(mask_BT, "fixed", total_tokens=1, total_rows=6, fixed_length=1, dtype=F64)
    gradients = [torch.autograd.grad(loss, logp_BT)[0] for loss in ((loss_BT * weight_BT).sum(), theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)
    assert metrics == {}
