"""Losses, one number a token: log-probabilities and advantages in, what to minimise and what to report out."""

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
    """The clipped policy-gradient loss of PPO and GRPO, per token and not reduced.

        r    = exp(policy_logp - rollout_logp)
        L    = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        L    = max(L, dual_clip A) where A < 0                         when dual_clip is given
        loss = -L + kl_coef KL(policy || reference) - entropy_coef H

    PPO: Schulman et al. 2017, arXiv 1707.06347, equation 7. GRPO, with the KL in the loss: Shao et al. 2024,
    arXiv 2402.03300, equation 3. clip_high > clip_low is DAPO's clip-higher: Yu et al. 2025, arXiv 2503.14476, section
    3.1. Dual clip: Ye et al. 2020, arXiv 1912.09729; it bounds the cost of a bad token that became far more likely.

    The denominator is what vLLM sampled from, so that r also carries the rollout's rounding. log r is clamped from
    above at 20, so that an advantage of 0 never meets an infinite ratio; past it the surrogate has no gradient. Where the
    policy alone holds a token for impossible (-inf) r is 0; where both do, 1, without a gradient.

    Args:
        policy_logp_BT: [B, T] float32 or float64, nats.
        rollout_logp_BT, reference_logp_BT: [B, T], nats.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere any input may hold anything, NaN and inf included.
        advantage_B: [B], the same for every token of a row; or else advantage_BT: [B, T], one a token.
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
        ValueError: a setting out of its range, a coefficient whose input is missing, or not exactly one advantage.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, rollout_logp_BT, reference_logp_BT, entropy_BT)
    check_clips(clip_low, clip_high, dual_clip)

    # The mask goes on the inputs: after arithmetic, 0 * inf would leak as NaN, into gradients as into values. With
    # every input 0 outside it, so is everything below but the ratio.
    logp_BT = inside(mask_BT, policy_logp_BT)
    log_ratio_BT = difference(logp_BT, inside(mask_BT, rollout_logp_BT.detach()))
    ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)

    loss_BT = -clipped_objective(ratio_BT, adv_BT, clip_low, clip_high, dual_clip)
    extra_BT, metrics = further_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    metrics |= {
        "ratio": inside(mask_BT, ratio_BT),
        "clip_fraction": clip_binds(ratio_BT, adv_BT, clip_low, clip_high, dual_clip).to(logp_BT.dtype),
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
    """GSPO: one ratio for a whole response, its tokens' geometric mean, clipped as one; per token and not reduced.

        s    = exp(mean over the row's trained tokens of policy_logp - rollout_logp)
        s_t  = sg[s] p_t / sg[p_t]                                     sg: no gradient
        loss = -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef H

    Zheng et al. 2025, arXiv 2507.18071: s is equation 7, and s_t that of GSPO-token, equation 14. Every s_t has the
    value of s, and under policy.reduction=sequence_mean and one advantage a row the sum over tokens has the gradient of
    equation 5; the token form is what lets the other reductions and an advantage a token work too. The clips of the
    paper (section 5.1) are a thousand times as narrow as those for token ratios, as a mean moves so much less.

    log s is clamped from above at 20. Arguments, returns and errors are as in `clipped_surrogate`; the metrics "ratio"
    (s) and "clip_fraction" have one value all along a row, "gap" is that of each token.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, rollout_logp_BT, reference_logp_BT, entropy_BT)
    check_clips(clip_low, clip_high, None)

    logp_BT = inside(mask_BT, policy_logp_BT)
    gap_BT = difference(logp_BT.detach(), inside(mask_BT, rollout_logp_BT.detach()))
    # In float64, because a clip at 3e-4 is near what float32 makes of the mean of thousands of tokens.
    mean_B1 = (row_sums(bounded(gap_BT), mask_BT) / mask_BT.sum(dim=1).clamp(min=1))[:, None]
    log_ratio_BT = mean_B1 + difference(logp_BT, logp_BT.detach())
    ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)

    loss_BT = -clipped_objective(ratio_BT, adv_BT, clip_low, clip_high, None)
    extra_BT, metrics = further_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    metrics |= {
        "ratio": inside(mask_BT, ratio_BT),
        "clip_fraction": clip_binds(ratio_BT, adv_BT, clip_low, clip_high, None).to(logp_BT.dtype),
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
    """The plain policy gradient, per token and not reduced, for one step on the samples of this very policy.

        loss = -A log p + kl_coef KL(policy || reference) - entropy_coef H

    Williams 1992. The loss of RLOO (Ahmadian et al. 2024, arXiv 2402.14740) and of ReMax (Li et al. 2023,
    arXiv 2310.10505), which have the KL in the reward and take the log-probability of a response, the sum over its
    tokens: that is policy.reduction=fixed with a length of 1. Its gradient means something, its value nothing.

    Arguments, returns and errors are as in `clipped_surrogate`; the metrics are "kl" and "entropy".
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, reference_logp_BT, entropy_BT)
    logp_BT = inside(mask_BT, policy_logp_BT)
    adv_BT = advantage_on_tokens(mask_BT, advantage_B, advantage_BT)
    loss_BT = -adv_BT * inside(
        adv_BT != 0, logp_BT
    )  # where nothing is to be learned, an impossible token costs nothing
    extra_BT, metrics = further_terms(logp_BT, mask_BT, reference_logp_BT, kl_coef, kl, entropy_BT, entropy_coef)
    return (loss_BT + extra_BT).to(policy_logp_BT.dtype), {name: value.detach() for name, value in metrics.items()}


reinforce.one_step = True  # type: ignore[attr-defined]


def negative_log_likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of supervised fine-tuning, per token and not reduced: loss = -log p(token).

    Args:
        policy_logp_BT: [B, T] float32 or float64, nats.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere policy_logp_BT may hold anything, NaN and inf included.

    Returns:
        loss_BT: [B, T], nats, 0 outside the mask.
        metrics: empty, since the loss is all there is to report; it is here so that every loss is called alike.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT)
    return inside(mask_BT, -policy_logp_BT), {}
