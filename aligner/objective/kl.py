"""Estimators of KL(policy || reference) from the log-probabilities of the sampled tokens."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from aligner.objective.masked import difference

Estimator = Literal["k1", "k2", "k3"]

# exp(20) = 5e8. Larger ratios carry no information, and float32 overflows at exp(88).
MAX_LOG_RATIO = 20.0


def k1(policy_logp_BT: Tensor, reference_logp_BT: Tensor) -> Tensor:
    """log(p / q): unbiased, high variance, often negative. Its expected gradient is 0: use it in rewards, not in losses."""
    return difference(policy_logp_BT, reference_logp_BT)


def k2(policy_logp_BT: Tensor, reference_logp_BT: Tensor) -> Tensor:
    """log(p / q)^2 / 2: biased, low variance. Its expected gradient is that of KL(p || q)."""
    return 0.5 * difference(policy_logp_BT, reference_logp_BT).square()


def k3(policy_logp_BT: Tensor, reference_logp_BT: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): unbiased, low variance, never negative. Its expected gradient is that of KL(q || p).

    log(q / p) is clamped from above at MAX_LOG_RATIO in both terms; beyond it the value is finite, without a gradient.
    It is not clamped from below, where the estimate is linear and cannot overflow.
    """
    log_ratio_BT = difference(reference_logp_BT, policy_logp_BT).clamp(max=MAX_LOG_RATIO)
    # expm1 is accurate for small log-ratios, where exp - 1 would cancel.
    return log_ratio_BT.expm1() - log_ratio_BT


def kl_estimate(policy_logp_BT: Tensor, reference_logp_BT: Tensor, kind: Estimator) -> Tensor:
    """Per-token estimates of KL(policy || reference) = E_p[log p - log q], for tokens that the policy p sampled.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), whose r is q / p:

        k1 = -log r        k2 = (log r)^2 / 2        k3 = (r - 1) - log r

    k3 is the term in GRPO's loss (Shao et al. 2024, arXiv 2402.03300, equation 4). The statements on bias hold for tokens
    sampled from the policy being evaluated; after an update the estimates lack the importance ratio.

    Args:
        policy_logp_BT, reference_logp_BT: [B, T], nats. There is no mask: pass finite numbers outside the response. Where
            both are -inf the estimate is 0; where only the reference is, infinite, as the KL is.
        kind: "k1", "k2" or "k3".

    Returns:
        kl_BT: [B, T], nats; differentiable in both arguments.

    Raises:
        ValueError: unknown `kind`.
    """
    assert policy_logp_BT.ndim == 2, f"policy_logp_BT must be [B, T], got {tuple(policy_logp_BT.shape)}"
    assert reference_logp_BT.shape == policy_logp_BT.shape, (
        f"reference_logp_BT is {tuple(reference_logp_BT.shape)}, policy_logp_BT {tuple(policy_logp_BT.shape)}"
    )
    estimators: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
    if kind not in estimators:
        raise ValueError(f"kl={kind!r} is not an estimator; use one of {', '.join(estimators)}.")
    return estimators[kind](policy_logp_BT, reference_logp_BT)
