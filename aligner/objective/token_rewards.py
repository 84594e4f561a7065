"""A reward a row to rewards a token: the KL penalty where it was incurred, the reward itself at the end; and back."""

import math

import torch
from torch import Tensor

from aligner.objective.kl import Estimator, kl_estimate
from aligner.objective.masked import check_rows, check_tokens, inside, row_sums


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
) -> Tensor:
    """The reward of each token in the episode that a response is.

        r_t = -kl_coef KL_t + [t is the last trained token] clip(r / reward_scale, -reward_clip, reward_clip)

    Ziegler et al. 2019, arXiv 1909.08593, equation 2, spread over the tokens as in Stiennon et al. 2020, arXiv
    2009.01325, and Ouyang et al. 2022, arXiv 2203.02155, equation 2: KL_t = k1 = log p - log q of the sampled token.
    k2 and k3 are never negative, but it is k1 whose sum over a response has, as a reward, the gradient of the KL.

    Args:
        reward_B: [B] floating, in the reward's unit. A row without a reward (NaN) gets 0 everywhere.
        mask_BT: [B, T] bool, the trained tokens. Elsewhere the log-probabilities may hold anything.
        policy_logp_BT: [B, T] float32 or float64, nats, of the policy that sampled. reference_logp_BT: [B, T], nats.
        kl_coef: reward per nat.
        reward_scale: what r is divided by before it is clipped, in the reward's unit; see `running_scale`.
        reward_clip: bound on the scaled reward, in its new unit.

    Returns:
        reward_BT: [B, T], dtype of policy_logp_BT, no gradient, 0 outside the mask. A row without a trained token has
        no place for its reward.

    Raises:
        ValueError: a setting out of its range, or a coefficient without a reference.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, reference_logp_BT)
    check_rows("reward_B", reward_B, len(mask_BT))
    if not reward_scale > 0.0 or not reward_clip > 0.0:
        raise ValueError(f"reward_scale={reward_scale} and reward_clip={reward_clip} must be more than 0.")
    if kl_coef != 0.0 and reference_logp_BT is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logp_BT; pass it, or set kl_coef=0.")

    last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    scaled_B = (reward_B.detach().double() / reward_scale).clamp(-reward_clip, reward_clip)
    reward_BT = inside(last_BT, scaled_B[:, None])
    if reference_logp_BT is not None and kl_coef != 0.0:
        policy_BT, reference_BT = (
            inside(mask_BT, logp_BT.detach().double()) for logp_BT in (policy_logp_BT, reference_logp_BT)
        )
        reward_BT = reward_BT - kl_coef * kl_estimate(policy_BT, reference_BT, kl)
    return inside(~torch.isnan(reward_B)[:, None], reward_BT).to(policy_logp_BT.dtype)


def kl_penalized(
    reward_B: Tensor,
    *,
    mask_BT: Tensor,
    policy_logp_BT: Tensor,
    reference_logp_BT: Tensor,
    kl_coef: float,
    kl: Estimator = "k1",
) -> Tensor:
    """The reward of a whole response with its KL: r - kl_coef sum_t KL_t, as RLOO and ReMax use it.

    Ahmadian et al. 2024, arXiv 2402.14740, section 2. A row without a reward stays NaN. Shapes as in `kl_rewards`.

    Returns:
        reward_B: [B], dtype of reward_B, no gradient.
    """
    check_tokens("policy_logp_BT", policy_logp_BT, mask_BT, reference_logp_BT)
    check_rows("reward_B", reward_B, len(mask_BT))
    policy_BT, reference_BT = (
        inside(mask_BT, logp_BT.detach().double()) for logp_BT in (policy_logp_BT, reference_logp_BT)
    )
    kl_B = row_sums(kl_estimate(policy_BT, reference_BT, kl), mask_BT)
    cost_B = kl_coef * kl_B if kl_coef != 0.0 else torch.zeros_like(kl_B)  # of nothing, even where the KL is infinite
    return (reward_B.detach().double() - cost_B).to(reward_B.dtype)


def returns_to_go(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The discounted sum of the rewards from a token on: R_t = r_t + gamma R_next.

    The token after a trained one is the next trained one: what lies between (the words of a tool, say) takes no step.

    Args:
        reward_BT: [B, T] floating. mask_BT: [B, T] bool, outside of which reward_BT may hold anything.
        gamma: discount a trained token.

    Returns:
        return_BT: [B, T], dtype of reward_BT, no gradient, 0 outside the mask.
    """
    assert reward_BT.ndim == 2 and mask_BT.shape == reward_BT.shape, f"{tuple(reward_BT.shape)}"
    check_discount("gamma", gamma)
    reward_TB = inside(mask_BT, reward_BT.detach().double()).T
    return_TB = torch.zeros_like(reward_TB)
    following_B = reward_TB.new_zeros(len(reward_BT))
    for t in reversed(range(len(reward_TB))):
        following_B = torch.where(mask_BT[:, t], reward_TB[t] + gamma * following_B, following_B)
        return_TB[t] = following_B
    return inside(mask_BT, return_TB.T).to(reward_BT.dtype)


def check_discount(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a discount."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} must lie in [0, 1]; 1 discounts nothing.")
