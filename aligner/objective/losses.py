"""Per-token policy losses: PPO/GRPO clipped surrogate, GSPO, REINFORCE, and the SFT negative log-likelihood."""

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


def clipped_surrogate(
    policy_logp_BT: Tensor,
    *,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    advantage_B: Tensor | None = None,
    advantage_BT: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Estimator = "k3",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy-gradient loss of PPO and GRPO, per token, not reduced.

        r    = exp(policy_logp - rollout_logp)
        L    = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        L    = max(L, dual_clip A) where A < 0                         when dual_clip is given
        loss = -L + kl_coef KL(policy || reference) - entropy_coef H

    PPO: Schulman et al. 2017, arXiv 1707.06347, equation 7. GRPO, with the KL in the loss: Shao et al. 2024,
    arXiv 2402.03300, equation 3. clip_high > clip_low is DAPO's clip-higher: Yu et al. 2025, arXiv 2503.14476, section
    3.1. Dual clip: Ye et al. 2020, arXiv 1912.09729; it bounds the loss of a token with A < 0 whose ratio is large.

    The denominator is the rollout engine's log-probability, so r also corrects the numerical mismatch between engine and
    trainer. log r is clamped from above at 20, so that an advantage of 0 is never multiplied by an infinite ratio; beyond
    it the surrogate has no gradient. Where only the policy's log-probability is -inf r is 0; where both are, 1 without a
    gradient.

    Args:
        policy_logp_BT: [B, T] float32 or float64, nats.
        rollout_logp_BT, reference_logp_BT: [B, T], nats.
        mask_BT: [B, T] bool, the trained tokens. Outside the mask inputs may hold any value, including NaN and inf.
        advantage_B: [B], one per row; or advantage_BT: [B, T], one per token. Exactly one of them is given.
        clip_low, clip_high: clip range 1 - clip_low to 1 + clip_high of the ratio, unitless.
        kl: the estimator, see `kl_estimate`.
        entropy_BT: [B, T], nats, of the policy's full distribution at each token.
        dual_clip: upper bound of the ratio where A < 0, more than 1; Ye et al. use 3.

    Returns:
        loss_BT: [B, T], dtype of policy_logp_BT, 0 outside the mask; only policy_logp_BT and entropy_BT get gradients.
        metrics: [B, T] each, detached, 0 outside the mask. "ratio"; "clip_fraction": 1 where a clip is active and the
            surrogate has no gradient; "gap": |policy_logp - rollout_logp|; "kl" and "entropy" if their inputs are given.

    Raises:
        ValueError: a setting out of range, a coefficient whose input is missing, or not exactly one advantage.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, rollout_logp_BT, reference_logp_BT, entropy_BT)
    check_clips(clip_low, clip_high, dual_clip)

    # Mask the inputs, not the results: 0 * inf would put NaN into values and gradients. With all inputs 0 outside the
    # mask, everything below is 0 there too, except the ratio.
    logp_BT = apply_mask(mask_BT, policy_logp_BT)
    log_ratio_BT = difference(logp_BT, apply_mask(mask_BT, rollout_logp_BT.detach()))
    ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)

    loss_BT = -clipped_objective(ratio_BT, adv_BT, clip_low, clip_high, dual_clip)
    extra_BT, metrics = kl_and_entropy_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    metrics |= {
        "ratio": apply_mask(mask_BT, ratio_BT),
        "clip_fraction": clip_is_active(ratio_BT, adv_BT, clip_low, clip_high, dual_clip).to(logp_BT.dtype),
        "gap": log_ratio_BT.abs(),
    }
    return (loss_BT + extra_BT).to(policy_logp_BT.dtype), {name: value.detach() for name, value in metrics.items()}


def sequence_clipped_surrogate(
    policy_logp_BT: Tensor,
    *,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    advantage_B: Tensor | None = None,
    advantage_BT: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    reference_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Estimator = "k3",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO: one importance ratio per response, the geometric mean of its token ratios; per token, not reduced.

        s    = exp(mean over the row's trained tokens of policy_logp - rollout_logp)
        s_t  = sg[s] p_t / sg[p_t]                                     sg: stop gradient
        loss = -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef H

    Zheng et al. 2025, arXiv 2507.18071: s is equation 7, s_t that of GSPO-token, equation 14. Every s_t has the value of
    s; with policy.reduction=sequence_mean and one advantage per row the gradient is that of equation 5. The token form
    also allows the other reductions and an advantage per token. The paper's clip range (section 5.1) is about 1000 times
    narrower than for token ratios, because a mean varies much less.

    log s is clamped from above at 20. Arguments, returns and errors are those of `clipped_surrogate`; the metrics
    "ratio" (s) and "clip_fraction" are constant along a row, "gap" is per token.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, rollout_logp_BT, reference_logp_BT, entropy_BT)
    check_clips(clip_low, clip_high, None)

    logp_BT = apply_mask(mask_BT, policy_logp_BT)
    gap_BT = difference(logp_BT.detach(), apply_mask(mask_BT, rollout_logp_BT.detach()))
    # float64: a clip of 3e-4 is close to float32's rounding error of a mean over thousands of tokens.
    mean_B1 = (row_sums(clamp_infinite(gap_BT), mask_BT) / mask_BT.sum(dim=1).clamp(min=1))[:, None]
    log_ratio_BT = mean_B1 + difference(logp_BT, logp_BT.detach())
    ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)

    loss_BT = -clipped_objective(ratio_BT, adv_BT, clip_low, clip_high, None)
    extra_BT, metrics = kl_and_entropy_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    metrics |= {
        "ratio": apply_mask(mask_BT, ratio_BT),
        "clip_fraction": clip_is_active(ratio_BT, adv_BT, clip_low, clip_high, None).to(logp_BT.dtype),
        "gap": gap_BT.abs(),
    }
    return (loss_BT + extra_BT).to(policy_logp_BT.dtype), {name: value.detach() for name, value in metrics.items()}


def reinforce(
    policy_logp_BT: Tensor,
    *,
    mask_BT: Tensor,
    advantage_B: Tensor | None = None,
    advantage_BT: Tensor | None = None,
    reference_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Estimator = "k2",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE: the on-policy gradient without a ratio, per token, not reduced. Valid for one optimizer step per batch.

        loss = -A log p + kl_coef KL(policy || reference) - entropy_coef H

    Williams 1992. The loss of RLOO (Ahmadian et al. 2024, arXiv 2402.14740) and ReMax (Li et al. 2023, arXiv
    2310.10505), which put the KL into the reward and use the log-probability of the whole response, the sum over its
    tokens: policy.reduction=fixed with a length of 1. Only the gradient is meaningful, not the loss value.

    Arguments, returns and errors are those of `clipped_surrogate`; the metrics are "kl" and "entropy".
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, reference_logp_BT, entropy_BT)
    logp_BT = apply_mask(mask_BT, policy_logp_BT)
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)
    # where the advantage is 0 a log-probability of -inf must not give NaN
    loss_BT = -adv_BT * apply_mask(adv_BT != 0, logp_BT)
    extra_BT, metrics = kl_and_entropy_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    return (loss_BT + extra_BT).to(policy_logp_BT.dtype), {name: value.detach() for name, value in metrics.items()}


reinforce.one_step = True  # type: ignore[attr-defined]


def negative_log_likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of supervised fine-tuning, per token, not reduced: loss = -log p(token).

    Args:
        policy_logp_BT: [B, T] float32 or float64, nats.
        mask_BT: [B, T] bool, the trained tokens. Outside the mask policy_logp_BT may hold any value.

    Returns:
        loss_BT: [B, T], nats, 0 outside the mask.
        metrics: empty; returned so that all losses have the same signature.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT)
    return apply_mask(mask_BT, -policy_logp_BT), {}
