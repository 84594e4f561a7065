"""Losses, one number a token: log-probabilities and advantages in, what to minimise and what to report out."""

import torch
from torch import Tensor

from aligner.objective.kl import MAX_LOG_RATIO, Estimator, kl_estimate


def clipped_surrogate(
    policy_logp_BT: Tensor,
    *,
    rollout_logp_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Estimator = "k3",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy-gradient loss of PPO and GRPO, per token and not reduced.

        r    = exp(policy_logp - rollout_logp)
        L    = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        L    = max(L, dual_clip A) where A < 0                         when dual_clip is given
        loss = -L + kl_coef KL(policy || reference) - entropy_coef H

    PPO: Schulman et al. 2017, arXiv 1707.06347, equation 7. GRPO, with the KL in the loss: Shao et al. 2024,
    arXiv 2402.03300, equation 3. clip_high > clip_low is DAPO's clip-higher: Yu et al. 2025, arXiv 2503.14476, section
    3.1. Dual clip: Ye et al. 2020, arXiv 1912.09729; it bounds the cost of a bad token that became far more likely.

    The denominator is what vLLM sampled from, so that r also carries the rollout's rounding. log r is clamped from
    above at 20, so that an advantage of 0 never meets an infinite ratio; past it the surrogate has no gradient.

    Args:
        policy_logp_BT: [B, T] float32 or float64, nats.
        rollout_logp_BT, reference_logp_BT: [B, T], nats.
        advantage_B: [B], the same for every token of a row.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere any input may hold anything, NaN and inf included.
        clip_low, clip_high: distances from a ratio of 1, unitless.
        kl: the estimator, see `kl_estimate`.
        entropy_BT: [B, T], nats, of the policy's whole distribution at each token.
        dual_clip: the bound on the ratio where A < 0, more than 1; Ye et al. use 3.

    Returns:
        loss_BT: [B, T], dtype of policy_logp_BT, 0 outside the mask; only policy_logp_BT and entropy_BT get gradients.
        metrics: [B, T] each, detached, 0 outside the mask. "ratio"; "clip_fraction": 1 where a clip binds, so that
            the surrogate has no gradient; "gap": |policy_logp - rollout_logp|; "kl", "entropy" where their inputs are
            given.

    Raises:
        ValueError: a setting out of its range, or a coefficient whose input is missing.
    """
    _check_shapes(policy_logp_BT, mask_BT, rollout_logp_BT, reference_logp_BT, entropy_BT)
    assert advantage_B.shape == policy_logp_BT.shape[:1], (
        f"advantage_B is {tuple(advantage_B.shape)}, policy_logp_BT {tuple(policy_logp_BT.shape)}"
    )
    _check_settings(clip_low, clip_high, dual_clip)
    _check_terms(kl_coef, kl, reference_logp_BT, entropy_coef, entropy_BT)

    # The mask goes on the inputs: after arithmetic, 0 * inf would leak as NaN, into gradients as into values. With
    # every input 0 outside it, so is everything below but the ratio.
    logp_BT = _inside(mask_BT, policy_logp_BT)
    log_ratio_BT = logp_BT - _inside(mask_BT, rollout_logp_BT.detach())
    ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()
    advantage_BT = _inside(mask_BT, advantage_B.detach()[:, None])

    loss_BT = -_clip(ratio_BT, advantage_BT, clip_low, clip_high, dual_clip)
    metrics = {
        "ratio": _inside(mask_BT, ratio_BT),
        "clip_fraction": _binds(ratio_BT, advantage_BT, clip_low, clip_high, dual_clip).to(logp_BT.dtype),
        "gap": log_ratio_BT.abs(),
    }
    if reference_logp_BT is not None:
        metrics["kl"] = kl_estimate(logp_BT, _inside(mask_BT, reference_logp_BT.detach()), kl)
        if kl_coef != 0.0:
            loss_BT = loss_BT + kl_coef * metrics["kl"]
    if entropy_BT is not None:
        metrics["entropy"] = _inside(mask_BT, entropy_BT)
        if entropy_coef != 0.0:
            loss_BT = loss_BT - entropy_coef * metrics["entropy"]
    return loss_BT.to(policy_logp_BT.dtype), {name: value_BT.detach() for name, value_BT in metrics.items()}


def negative_log_likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of supervised fine-tuning, per token and not reduced: loss = -log p(token).

    Args:
        policy_logp_BT: [B, T] float32 or float64, nats.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere policy_logp_BT may hold anything, NaN and inf included.

    Returns:
        loss_BT: [B, T], nats, 0 outside the mask.
        metrics: empty, since the loss is all there is to report; it is here so that every loss is called alike.
    """
    _check_shapes(policy_logp_BT, mask_BT)
    return _inside(mask_BT, -policy_logp_BT), {}


def _inside(mask_BT: Tensor, value_BT: Tensor) -> Tensor:
    """`value_BT` on the trained tokens, 0 elsewhere; `where`, unlike a product, also stops NaN and inf, both ways."""
    return torch.where(mask_BT, value_BT, 0.0)


def _clip(ratio_BT: Tensor, advantage_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None) -> Tensor:
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    if dual_clip is None:
        return objective_BT
    return torch.where(advantage_BT < 0, torch.maximum(objective_BT, dual_clip * advantage_BT), objective_BT)


def _binds(
    ratio_BT: Tensor, advantage_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Where a clip holds the objective constant: only on the side to which the advantage pushes the ratio."""
    held_BT = ((advantage_BT > 0) & (ratio_BT > 1.0 + clip_high)) | ((advantage_BT < 0) & (ratio_BT < 1.0 - clip_low))
    if dual_clip is not None:
        held_BT = held_BT | ((advantage_BT < 0) & (ratio_BT > dual_clip))
    return held_BT


def _check_shapes(policy_logp_BT: Tensor, mask_BT: Tensor, *others_BT: Tensor | None) -> None:
    assert policy_logp_BT.ndim == 2, f"policy_logp_BT must be [B, T], got {tuple(policy_logp_BT.shape)}"
    # bfloat16 resolves a log-probability of 8 to 0.03: its ratios are noise.
    assert policy_logp_BT.dtype in (torch.float32, torch.float64), f"policy_logp_BT is {policy_logp_BT.dtype}"
    assert mask_BT.dtype == torch.bool, f"mask_BT must be bool, got {mask_BT.dtype}"
    for value_BT in (mask_BT, *others_BT):
        assert value_BT is None or value_BT.shape == policy_logp_BT.shape, (
            f"an input is {tuple(value_BT.shape)}, policy_logp_BT {tuple(policy_logp_BT.shape)}"
        )


def _check_settings(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low={clip_low} must lie in [0, 1]; 0.2 is usual, 1 clips nothing.")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high={clip_high} must be 0 or more; 0.2 is usual, 0.28 is DAPO's, inf clips nothing.")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip={dual_clip} must be more than 1; 3 is usual, null turns it off.")


def _check_terms(
    kl_coef: float, kl: Estimator, reference_logp_BT: Tensor | None, entropy_coef: float, entropy_BT: Tensor | None
) -> None:
    if kl_coef != 0.0 and reference_logp_BT is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logp_BT; pass it, or set kl_coef=0.")
    if kl_coef != 0.0 and kl == "k1":
        raise ValueError(
            f"kl=k1 with kl_coef={kl_coef} regularises nothing, the gradient of k1 being 0 in the mean; use k2 or k3."
        )
    if entropy_coef != 0.0 and entropy_BT is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy_BT; pass it, or set entropy_coef=0.")
