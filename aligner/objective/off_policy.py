"""Off-policy correction: truncated or masked importance weights, and the decoupled PPO loss."""

from typing import Literal, get_args

import torch
from torch import Tensor

from aligner.objective.kl import MAX_LOG_RATIO, Estimator
from aligner.objective.masked import apply_mask, check_tokens, clamp_infinite, difference, row_sums
from aligner.objective.surrogate import (
    advantage_on_tokens,
    check_clips,
    clip_is_active,
    clipped_objective,
    kl_and_entropy_terms,
)

Correction = Literal["truncate", "mask", "none"]
Level = Literal["token", "sequence"]


def importance_weights(
    proximal_logp_BT: Tensor,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    correction: Correction = "truncate",
    level: Level = "token",
    weight_low: float = 0.0,
    weight_high: float = 2.0,
) -> Tensor:
    """Importance weights of the proximal policy against the sampling (behaviour) policy, bounded.

        w_t = exp(proximal_logp_t - rollout_logp_t)                     level=token
        w_t = exp(sum over the row's trained tokens of that difference) level=sequence, constant along a row
        truncate: clip(w, weight_low, weight_high)      mask: w where weight_low <= w <= weight_high, else 0
        none: 1

    Truncated at 1 it is V-trace's weight: Espeholt et al. 2018, arXiv 1802.01561, section 4.1. "mask" drops tokens whose
    sampling policy is too far from the current one.

    Args:
        proximal_logp_BT, rollout_logp_BT: [B, T], nats.
        mask_BT: [B, T] bool, the trained tokens. Outside the mask the others may hold any value.
        weight_low, weight_high: bounds, unitless; inf: no upper bound.

    Returns:
        [B, T], dtype of proximal_logp_BT, no gradient, 0 outside the mask.

    Raises:
        ValueError: unknown correction or level, or bounds that exclude a weight of 1.
    """
    _check_weights(correction, level, weight_low, weight_high)
    weight_BT = _unbounded_weights(proximal_logp_BT, rollout_logp_BT, mask_BT, level)
    return _bound_weights(weight_BT, mask_BT, correction, weight_low, weight_high)


def _check_weights(correction: Correction, level: Level, weight_low: float, weight_high: float) -> None:
    if correction not in get_args(Correction) or level not in get_args(Level):
        raise ValueError(
            f"correction={correction}, level={level}: use {', '.join(get_args(Correction))} with "
            f"{' or '.join(get_args(Level))}."
        )
    if not 0.0 <= weight_low <= 1.0 <= weight_high:
        raise ValueError(
            f"weight_low={weight_low} and weight_high={weight_high} must have 1, the weight of an unchanged policy, "
            "between them; 0 and 2 are usual."
        )


def _bound_weights(
    weight_BT: Tensor, mask_BT: Tensor, correction: Correction, weight_low: float, weight_high: float
) -> Tensor:
    if correction == "none":
        return mask_BT.to(weight_BT.dtype)
    if correction == "truncate":
        return apply_mask(mask_BT, weight_BT.clamp(weight_low, weight_high))
    return torch.where((weight_BT >= weight_low) & (weight_BT <= weight_high), weight_BT, 0.0)


def _unbounded_weights(proximal_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    """Importance weights without bounds, except for the clamp at exp(20); 0 outside the mask."""
    log_BT = difference(apply_mask(mask_BT, proximal_logp_BT.detach()), apply_mask(mask_BT, rollout_logp_BT.detach()))
    if level == "sequence":
        log_BT = row_sums(clamp_infinite(log_BT), mask_BT)[:, None].expand_as(log_BT).to(log_BT.dtype)
    return apply_mask(mask_BT, log_BT.clamp(max=MAX_LOG_RATIO).exp())


def decoupled_surrogate(
    policy_logp_BT: Tensor,
    *,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    proximal_logp_BT: Tensor | None = None,
    advantage_B: Tensor | None = None,
    advantage_BT: Tensor | None = None,
    correction: Correction = "truncate",
    level: Level = "token",
    weight_low: float = 0.0,
    weight_high: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Estimator = "k3",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoupled PPO: the clipped policy-gradient loss on samples of an older policy, per token, not reduced.

        r    = exp(policy_logp - proximal_logp)
        loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef H
        w    = importance_weights(proximal_logp, rollout_logp)

    Hilton et al. 2021, arXiv 2110.00641, equation 2, with bounded weights; for language models Fu et al. 2025 (AReaL),
    arXiv 2505.24298, equation 5. The trust region of `clipped_surrogate` is centred on the sampling policy: the staler
    that is, the more tokens are clipped before anything is learnt from them. Here it is centred on the proximal policy,
    the one before this update, and the importance weight corrects for the sampling policy.

    Args:
        proximal_logp_BT: [B, T], nats, of the policy before the first optimizer step of this update; None: the current
            policy, detached, which is the same if a batch is one optimizer step.
        correction, level, weight_low, weight_high: see `importance_weights`.

    Other arguments, returns and errors are those of `clipped_surrogate`; further metrics are "weight" and
    "bounded_fraction": 1 where a bound of the weight is active. "gap" is |proximal_logp - rollout_logp|.
    """
    check_tokens(
        "policy_logp_BT", policy_logp_BT, mask_BT, rollout_logp_BT, proximal_logp_BT, reference_logp_BT, entropy_BT
    )
    check_clips(clip_low, clip_high, dual_clip)
    _check_weights(correction, level, weight_low, weight_high)
    logp_BT = apply_mask(mask_BT, policy_logp_BT)
    proximal_BT = logp_BT.detach() if proximal_logp_BT is None else apply_mask(mask_BT, proximal_logp_BT.detach())
    ratio_BT = difference(logp_BT, proximal_BT).clamp(max=MAX_LOG_RATIO).exp()
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)
    unbounded_BT = _unbounded_weights(proximal_BT, rollout_logp_BT, mask_BT, level)
    weight_BT = _bound_weights(unbounded_BT, mask_BT, correction, weight_low, weight_high)

    loss_BT = -weight_BT * clipped_objective(ratio_BT, adv_BT, clip_low, clip_high, dual_clip)
    extra_BT, metrics = kl_and_entropy_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    metrics |= {
        "ratio": apply_mask(mask_BT, ratio_BT),
        "clip_fraction": clip_is_active(ratio_BT, adv_BT, clip_low, clip_high, dual_clip).to(logp_BT.dtype),
        "gap": difference(proximal_BT, apply_mask(mask_BT, rollout_logp_BT.detach())).abs(),
        "weight": weight_BT,
        "bounded_fraction": ((weight_BT != unbounded_BT) & (correction != "none")).to(logp_BT.dtype),
    }
    return (loss_BT + extra_BT).to(policy_logp_BT.dtype), {name: value.detach() for name, value in metrics.items()}
