"""Row rewards to token rewards with a per-token KL penalty, and token rewards to returns."""

import math

import torch
from torch import Tensor

from aligner.objective.kl import Estimator, kl_estimate
from aligner.objective.masked import apply_mask, check_rows, check_tokens, row_sums


def place_rewards(reward_B: Tensor, *, mask_BT: Tensor, turn_reward_BT: Tensor | None = None) -> Tensor:
    """Rewards at the tokens that they follow: those of turns at the turns' last tokens; what the row's reward is more than their
    sum, at the row's last trained token. Each row's sum is its reward.

    Args:
        reward_B: [B] floating. A row without a reward (NaN) gets 0 everywhere.
        mask_BT: [B, T] bool, the trained tokens.
        turn_reward_BT: [B, T] floating, 0 where no turn ends; None: the whole reward falls to the last token.

    Returns:
        [B, T] float64, no gradient, 0 outside the mask. The reward of a row without trained tokens is dropped.
    """
    last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    left_B = reward_B.detach().double()
    if turn_reward_BT is None:
        return apply_mask(last_BT & ~torch.isnan(reward_B)[:, None], left_B[:, None])
    turns_BT = apply_mask(mask_BT & ~torch.isnan(reward_B)[:, None], turn_reward_BT.detach().double())
    return turns_BT + apply_mask(last_BT & ~torch.isnan(reward_B)[:, None], (left_B - turns_BT.sum(1))[:, None])


def kl_rewards(
    reward_B: Tensor,
    *,
    mask_BT: Tensor,
    policy_logp_BT: Tensor,
    reference_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: Estimator = "k1",
    reward_scale: float = 1.0,
    reward_clip: float = math.inf,
    turn_reward_BT: Tensor | None = None,
) -> Tensor:
    """Token rewards: a KL penalty on every trained token, the response's reward on the last one, those of turns where they end.

        r_t = -kl_coef KL_t + clip(place_rewards(r)_t / reward_scale, -reward_clip, reward_clip)

    Ziegler et al. 2019, arXiv 1909.08593, equation 2, spread over the tokens as in Stiennon et al. 2020, arXiv
    2009.01325, and Ouyang et al. 2022, arXiv 2203.02155, equation 2: KL_t = k1 = log p - log q of the sampled token.
    k2 and k3 are never negative, but as a reward only k1 summed over a response has the gradient of the KL.

    Args:
        reward_B: [B] floating. A row without a reward (NaN) gets 0 everywhere.
        mask_BT: [B, T] bool, the trained tokens. Outside the mask the log-probabilities may hold any value.
        policy_logp_BT: [B, T] float32 or float64, nats, of the sampling policy. reference_logp_BT: [B, T], nats.
        kl_coef: reward per nat.
        kl: the estimator, see `kl_estimate`.
        reward_scale: divisor of r before it is clipped, in the reward's unit; see `running_scale`.
        reward_clip: bound of the scaled reward (of each turn, if turns have rewards), unitless.
        turn_reward_BT: [B, T], see `place_rewards`; None: the whole reward falls to the last trained token.

    Returns:
        reward_BT: [B, T], dtype of policy_logp_BT, no gradient, 0 outside the mask. The reward of a row without trained
        tokens is dropped.

    Raises:
        ValueError: a setting out of range, or kl_coef without a reference.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, reference_logp_BT)
    check_rows("reward_B", reward_B, len(mask_BT))
    if not reward_scale > 0.0 or not reward_clip > 0.0:
        raise ValueError(f"reward_scale={reward_scale} and reward_clip={reward_clip} must be more than 0.")
    if kl_coef != 0.0 and reference_logp_BT is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logp_BT; pass it, or set kl_coef=0.")

    placed_BT = place_rewards(reward_B, mask_BT=mask_BT, turn_reward_BT=turn_reward_BT)
    reward_BT = (placed_BT / reward_scale).clamp(-reward_clip, reward_clip)
    if reference_logp_BT is not None and kl_coef != 0.0:
        policy_BT, reference_BT = (
            apply_mask(mask_BT, logp_BT.detach().double()) for logp_BT in (policy_logp_BT, reference_logp_BT)
        )
        reward_BT = reward_BT - kl_coef * kl_estimate(policy_BT, reference_BT, kl)
    return apply_mask(~torch.isnan(reward_B)[:, None], reward_BT).to(policy_logp_BT.dtype)


def kl_penalized(
    reward_B: Tensor,
    *,
    mask_BT: Tensor,
    policy_logp_BT: Tensor,
    reference_logp_BT: Tensor,
    kl_coef: float,
    kl: Estimator = "k1",
) -> Tensor:
    """Row rewards minus the response's KL: r - kl_coef sum_t KL_t, as in RLOO and ReMax.

    Ahmadian et al. 2024, arXiv 2402.14740, section 2. NaN (no reward) stays NaN. Arguments as in `kl_rewards`.

    Returns:
        reward_B: [B], dtype of reward_B, no gradient.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, reference_logp_BT)
    check_rows("reward_B", reward_B, len(mask_BT))
    policy_BT, reference_BT = (
        apply_mask(mask_BT, logp_BT.detach().double()) for logp_BT in (policy_logp_BT, reference_logp_BT)
    )
    kl_B = row_sums(kl_estimate(policy_BT, reference_BT, kl), mask_BT)
    cost_B = kl_coef * kl_B if kl_coef != 0.0 else torch.zeros_like(kl_B)  # not NaN where the KL is infinite
    return (reward_B.detach().double() - cost_B).to(reward_B.dtype)


def returns_to_go(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted returns: R_t = r_t + gamma R_next, where "next" is the row's next trained token.

    Untrained tokens in between (a tool's output, say) are no time steps.

    Args:
        reward_BT: [B, T] floating. mask_BT: [B, T] bool; outside the mask reward_BT may hold any value.
        gamma: discount factor per trained token, in [0, 1].

    Returns:
        return_BT: [B, T], dtype of reward_BT, no gradient, 0 outside the mask.
    """
    assert reward_BT.ndim == 2 and mask_BT.shape == reward_BT.shape, f"{tuple(reward_BT.shape)}"
    check_discount("gamma", gamma)
    reward_TB = apply_mask(mask_BT, reward_BT.detach().double()).T
    return_TB = torch.zeros_like(reward_TB)
    next_return_B = reward_TB.new_zeros(len(reward_BT))
    for t in reversed(range(len(reward_TB))):
        next_return_B = torch.where(mask_BT[:, t], reward_TB[t] + gamma * next_return_B, next_return_B)
        return_TB[t] = next_return_B
    return apply_mask(mask_BT, return_TB.T).to(reward_BT.dtype)


def check_discount(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} must lie in [0, 1]; 1 means no discount.")
