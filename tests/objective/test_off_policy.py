"""Learning from another policy's samples: weights by hand, the loss against TRL's, and its gradient's expectation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from aligner.objective.losses import clipped_surrogate
from aligner.objective.off_policy import decoupled_surrogate, importance_weights
from aligner.objective.reduction import Mean
from tests.objective.test_losses_against_trl import DTYPES, F64, ragged, reduced, same

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl

NAN = math.nan
MASK_BT = torch.tensor([[True, True, True, False], [True, True, False, False]])
ROLLOUT_BT = torch.tensor([[-1.0, -2.0, -3.0, NAN], [-1.0, -1.0, NAN, NAN]], dtype=F64)
RATIOS_BT = torch.tensor([[4.0, 0.5, 1.5, 9.0], [0.1, 20.0, 9.0, 9.0]], dtype=F64)


@pytest.mark.parametrize(
    ("correction", "level", "bounds", "expected"),
    [
        ("truncate", "token", {}, [[2.0, 0.5, 1.5, 0.0], [0.1, 2.0, 0.0, 0.0]]),
        ("truncate", "token", {"weight_low": 0.25, "weight_high": 3.0}, [[3.0, 0.5, 1.5, 0.0], [0.25, 3.0, 0.0, 0.0]]),
        ("mask", "token", {}, [[0.0, 0.5, 1.5, 0.0], [0.1, 0.0, 0.0, 0.0]]),
        ("mask", "token", {"weight_low": 0.25, "weight_high": 5.0}, [[4.0, 0.5, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        ("truncate", "sequence", {"weight_high": 2.5}, [[2.5, 2.5, 2.5, 0.0], [2.0, 2.0, 0.0, 0.0]]),  # 3 and 2
        ("mask", "sequence", {"weight_high": 2.5}, [[0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]),
        ("none", "token", {}, [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]),
    ],
)
def test_weights_by_hand(correction: Any, level: Any, bounds: dict[str, float], expected: list[list[float]]) -> None:
    proximal_BT = ROLLOUT_BT + RATIOS_BT.log()
    weight_BT = importance_weights(proximal_BT, ROLLOUT_BT, MASK_BT, correction=correction, level=level, **bounds)
    torch.testing.assert_close(weight_BT, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"correction": "clip"}, "correction=clip"),
        ({"level": "row"}, "level=row"),
        ({"weight_low": 1.5}, "weight_low=1.5"),
        ({"weight_high": 0.5}, "weight_high=0.5"),
        ({"weight_low": -0.1}, "weight_low=-0.1"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        importance_weights(ROLLOUT_BT, ROLLOUT_BT, MASK_BT, **settings)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "name"), [("sequence_mean", "grpo"), ("token_mean", "bnpo"), ("fixed", "dr_grpo")])
@pytest.mark.parametrize(
    "settings",
    [{}, {"correction": "mask"}, {"level": "sequence", "kl_coef": 0.2}, {"weight_low": 0.9, "weight_high": 1.1}],
)
def test_the_loss_is_trls(
    trl: Trl, settings: dict[str, Any], kind: Mean, name: str, seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    """TRL's ratio is to the policy before the update, times a weight that it is handed: written out here."""
    batch = ragged(seed, dtype)
    mask_BT, rollout_BT = batch["mask_BT"], batch["rollout_logp_BT"]
    noise_BT = torch.randn(rollout_BT.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    proximal_BT = rollout_BT + 0.4 * noise_BT
    difference_BT = (proximal_BT - rollout_BT) * mask_BT
    if settings.get("level") == "sequence":
        difference_BT = difference_BT.sum(1, keepdim=True)
    weight_BT, low, high = difference_BT.exp(), settings.get("weight_low", 0.0), settings.get("weight_high", 2.0)
    if settings.get("correction") == "mask":
        weight_BT = weight_BT.masked_fill((weight_BT < low) | (weight_BT > high), 0.0)
    else:
        weight_BT = weight_BT.clamp(low, high)
    theirs, _ = trl.grpo(
        batch["policy_logp_BT"], proximal_BT, mask_BT, batch["advantage_B"], batch["reference_logp_BT"], loss_type=name,
        epsilon_low=0.2, epsilon_high=0.28, beta=settings.get("kl_coef", 0.0), max_completion_length=16,
        weight_BT=weight_BT,
    )  # fmt: skip
    loss_BT, metrics = decoupled_surrogate(**batch, proximal_logp_BT=proximal_BT, clip_high=0.28, **settings)
    same(reduced(loss_BT, mask_BT, kind), theirs, batch["policy_logp_BT"], tolerance)
    expected_BT = weight_BT.expand_as(mask_BT) * mask_BT
    torch.testing.assert_close(metrics["weight"], expected_BT, rtol=tolerance, atol=tolerance)
    unbounded_BT = difference_BT.exp().expand_as(mask_BT)
    assert torch.equal(metrics["bounded_fraction"].bool(), mask_BT & ~unbounded_BT.isclose(expected_BT, rtol=1e-5))


def test_on_policy_it_is_the_clipped_surrogate() -> None:
    batch = ragged(0, F64)
    batch["rollout_logp_BT"] = batch["policy_logp_BT"].detach()
    for settings in ({}, {"correction": "mask"}, {"correction": "none"}, {"level": "sequence"}):
        ours, _ = decoupled_surrogate(**batch, **settings)  # type: ignore[arg-type]
        plain, _ = clipped_surrogate(**batch)
        same(ours.sum(), plain.sum(), batch["policy_logp_BT"], 1e-12)


def test_the_weight_makes_the_gradient_right_in_the_mean() -> None:
    """Over all tokens that the sampling policy could draw, the weighted gradient is the policy's own, exactly; without
    the weight it is another one."""
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.randn(12, generator=generator, dtype=F64, requires_grad=True)
    sampler_V = torch.log_softmax(logits_V.detach() + 0.5 * torch.randn(12, generator=generator, dtype=F64), 0)
    reward_V = torch.randn(12, generator=generator, dtype=F64)
    (exact_V,) = torch.autograd.grad(-(torch.softmax(logits_V, 0) * reward_V).sum(), logits_V)

    def expected(correction: Any) -> torch.Tensor:
        logp_V = torch.log_softmax(logits_V, 0)  # each token is a row of one token, as often as it is drawn
        loss_V1, _ = decoupled_surrogate(
            logp_V[:, None], rollout_logp_BT=sampler_V[:, None], mask_BT=torch.ones(12, 1, dtype=torch.bool),
            advantage_B=reward_V, correction=correction, weight_high=math.inf,
        )  # fmt: skip
        return torch.autograd.grad((sampler_V.exp() * loss_V1[:, 0]).sum(), logits_V)[0]

    torch.testing.assert_close(expected("truncate"), exact_V, rtol=1e-10, atol=1e-12)
    assert (expected("none") - exact_V).abs().max() > 0.01


def test_only_the_policy_gets_a_gradient_and_nothing_outside_the_mask() -> None:
    batch = ragged(2, F64)
    leaves = {name: batch[name].clone().requires_grad_() for name in ("rollout_logp_BT", "advantage_B")}
    batch["policy_logp_BT"] = batch["policy_logp_BT"].detach().masked_fill(~batch["mask_BT"], NAN).requires_grad_()
    loss_BT, metrics = decoupled_surrogate(**{**batch, **leaves}, proximal_logp_BT=batch["policy_logp_BT"])
    loss_BT.sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())
    assert torch.equal(
        batch["policy_logp_BT"].grad[~batch["mask_BT"]], torch.zeros(int((~batch["mask_BT"]).sum()), dtype=F64)
    )
    assert loss_BT.isfinite().all() and all(
        value.isfinite().all() and not value.requires_grad for value in metrics.values()
    )
