"""Learning from samples of an earlier policy: importance weights, truncated or masked, beside the clip."""

from typing import Literal, get_args

import torch
from torch import Tensor

from aligner.objective.kl import MAX_LOG_RATIO, Estimator
from aligner.objective.masked import bounded, check_tokens, difference, inside, row_sums
from aligner.objective.surrogate import (
    advantage_on_tokens,
    check_clips,
    clip_binds,
    clipped_objective,
    further_terms,
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
    """How much more likely the policy is than the one that sampled, bounded.

        w_t = exp(proximal_logp_t - rollout_logp_t)                     level=token
        w_t = exp(sum over the row's trained tokens of that difference) level=sequence, the same all along a row
        truncate: clip(w, weight_low, weight_high)      mask: w where weight_low <= w <= weight_high, else 0
        none: 1

    Truncated at 1 it is V-trace's: Espeholt et al. 2018, arXiv 1802.01561, section 4.1. Masked tokens are those of
    whose old policy the new one knows too little to learn from.

    Args:
        proximal_logp_BT, rollout_logp_BT: [B, T], nats.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere the others may hold anything.
        weight_low, weight_high: unitless; inf bounds nothing.

    Returns:
        [B, T], dtype of proximal_logp_BT, without gradient, 0 outside the mask.

    Raises:
        ValueError: an unknown correction or level, or bounds that leave nothing.
    """
    _check_weights(correction, level, weight_low, weight_high)
    weight_BT = _ratios(proximal_logp_BT, rollout_logp_BT, mask_BT, level)
    return _bounded(weight_BT, mask_BT, correction, weight_low, weight_high)


def _check_weights(correction: Correction, level: Level, weight_low: float, weight_high: float) -> None:
    if correction not in get_args(Correction) or level not in get_args(Level):
        raise ValueError(
            f"correction={correction}, level={level}: use {', '.join(get_args(Correction))} with "
            f"{' or '.join(get_args(Level))}."
        )
    if not 0.0 <= weight_low <= 1.0 <= weight_high:
        raise ValueError(
            f"weight_low={weight_low} and weight_high={weight_high} must hold 1, the weight of an unchanged policy, "
            "between them; 0 and 2 are usual."
        )


def _bounded(
    weight_BT: Tensor, mask_BT: Tensor, correction: Correction, weight_low: float, weight_high: float
) -> Tensor:
    if correction == "none":
        return mask_BT.to(weight_BT.dtype)
    if correction == "truncate":
        return inside(mask_BT, weight_BT.clamp(weight_low, weight_high))
    return torch.where((weight_BT >= weight_low) & (weight_BT <= weight_high), weight_BT, 0.0)


def _ratios(proximal_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    """The weights without bounds, but for the clamp at exp(20); 0 outside the mask."""
    log_BT = difference(inside(mask_BT, proximal_logp_BT.detach()), inside(mask_BT, rollout_logp_BT.detach()))
    if level == "sequence":
        log_BT = row_sums(bounded(log_BT), mask_BT)[:, None].expand_as(log_BT).to(log_BT.dtype)
    return inside(mask_BT, log_BT.clamp(max=MAX_LOG_RATIO).exp())


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
    """The clipped policy-gradient loss on samples of another policy: decoupled PPO, per token and not reduced.

        r    = exp(policy_logp - proximal_logp)
        loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef H
        w    = importance_weights(proximal_logp, rollout_logp)

    Hilton et al. 2021, arXiv 2110.00641, equation 2, with the weight bounded; for language models Fu et al. 2025
    (AReaL), arXiv 2505.24298, equation 5. `clipped_surrogate` measures its trust region from the policy that sampled: the
    staler that is, the more tokens are clipped away before anything is learnt from them. Here the region lies around the
    proximal policy, the one before this update, and the weight makes up for who sampled.

    Args:
        proximal_logp_BT: [B, T], nats, of the policy before this update's first step; None: this very step's policy,
            which is the same where a batch is one step.
        correction, level, weight_low, weight_high: see `importance_weights`.

    The others, returns and errors are as in `clipped_surrogate`; the metrics are also "weight", and
    "bounded_fraction": 1 where the weight met a bound. "gap" is |proximal_logp - rollout_logp|.
    """
    check_tokens(
        "policy_logp_BT", policy_logp_BT, mask_BT, rollout_logp_BT, proximal_logp_BT, reference_logp_BT, entropy_BT
    )
    check_clips(clip_low, clip_high, dual_clip)
    _check_weights(correction, level, weight_low, weight_high)
    logp_BT = inside(mask_BT, policy_logp_BT)
    proximal_BT = logp_BT.detach() if proximal_logp_BT is None else inside(mask_BT, proximal_logp_BT.detach())
    ratio_BT = difference(logp_BT, proximal_BT).clamp(max=MAX_LOG_RATIO).exp()
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)
    unbounded_BT = _ratios(proximal_BT, rollout_logp_BT, mask_BT, level)
    weight_BT = _bounded(unbounded_BT, mask_BT, correction, weight_low, weight_high)

    loss_BT = -weight_BT * clipped_objective(ratio_BT, adv_BT, clip_low, clip_high, dual_clip)
    extra_BT, metrics = further_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    metrics |= {
        "ratio": inside(mask_BT, ratio_BT),
        "clip_fraction": clip_binds(ratio_BT, adv_BT, clip_low, clip_high, dual_clip).to(logp_BT.dtype),
        "gap": difference(proximal_BT, inside(mask_BT, rollout_logp_BT.detach())).abs(),
        "weight": weight_BT,
        "bounded_fraction": ((weight_BT != unbounded_BT) & (correction != "none")).to(logp_BT.dtype),
    }
    return (loss_BT + extra_BT).to(policy_logp_BT.dtype), {name: value.detach() for name, value in metrics.items()}
