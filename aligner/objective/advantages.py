"""Advantage estimators without a critic: GRPO, Dr. GRPO, RLOO, ReMax, REINFORCE++."""

from typing import Literal, get_args

import torch
from torch import Tensor

from aligner.objective.token_rewards import returns_to_go

Normalize = Literal["std", "none"]
ROUNDING = 1e-8
"""Advantages up to this are rounding: float64 sums of one total in several ways, over a deviation of `epsilon`."""


def has_reward(reward_B: Tensor) -> Tensor:
    """Which rows have a reward (`~isnan`). NaN means that scoring failed, timed out or could not parse; it is never scored 0.

    Mask such rows out of the loss with `mask_BT & has_reward(reward_B)[:, None]`: an advantage of 0 alone removes only
    their policy-gradient term, not their KL and entropy terms or their share of the denominator.

    Returns:
        bool [B].
    """
    assert reward_B.ndim == 1, f"reward_B must be [B], got {tuple(reward_B.shape)}"
    return ~torch.isnan(reward_B)


def has_signal(reward_B: Tensor, *, group_size: int) -> Tensor:
    """Which rows belong to a group whose rewards differ; all other rows have an advantage of 0 and no gradient.

    The filter of dynamic sampling: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2, equation 11; for rewards of 0
    and 1 it is 0 < correct responses < group size.

    Args:
        reward_B: [B] floating; complete groups in order. NaN (no reward) is ignored.

    Returns:
        bool [B], the same for all rows of a group, so that selecting by it keeps groups complete.
    """
    centered_PG, _ = _centered(reward_B, group_size)
    return (centered_PG != 0).any(dim=1).repeat_interleave(group_size)


def has_advantage(advantage_BT: Tensor, *, group_size: int) -> Tensor:
    """Which rows belong to a group with an advantage other than 0 on any token; all other groups have no gradient.

    Args:
        advantage_BT: [B, T], 0 outside the mask; complete groups in order.

    Returns:
        bool [B], the same for all rows of a group.
    """
    assert advantage_BT.ndim == 2 and len(advantage_BT) % group_size == 0, f"{tuple(advantage_BT.shape)}"
    differs_B = (advantage_BT.abs() > ROUNDING).any(dim=1)
    return differs_B.view(-1, group_size).any(dim=1).repeat_interleave(group_size)


def group_advantages(
    reward_B: Tensor, *, group_size: int, normalize: Normalize = "std", epsilon: float = 1e-4
) -> Tensor:
    """Group-relative advantages.

        A_b = (r_b - mean(r in b's group)) / (std(r in b's group) + epsilon)      normalize="std"
        A_b =  r_b - mean(r in b's group)                                         normalize="none"

    "std" is GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2); the paper does not specify the standard deviation;
    as is common it is the sample one (n - 1) with epsilon 1e-4. "none" is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783),
    which drops the division because it upweights prompts that are nearly always or nearly never solved.

    A row without a reward (NaN) has an advantage of 0 and enters neither the mean nor the deviation. A group with fewer
    than 2 rewards, or with equal rewards, has advantages of exactly 0.

    Args:
        reward_B: [B] floating; complete groups in order: row b belongs to group b // group_size.
        group_size: samples per prompt.
        epsilon: added to the deviation, in the reward's unit; unused for "none".

    Returns:
        advantage_B: [B], dtype of reward_B, no gradient, in standard deviations ("std") or the reward's unit ("none").

    Raises:
        ValueError: unknown `normalize`, or an infinite reward, which would make its whole group NaN.
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize={normalize!r} is unknown; use one of {', '.join(get_args(Normalize))}.")
    centered_PG, count_P1 = _centered(reward_B, group_size)
    if normalize == "std":
        variance_P1 = centered_PG.square().sum(dim=1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        centered_PG = centered_PG / (variance_P1.sqrt() + epsilon)
    return centered_PG.flatten().to(reward_B.dtype)


def leave_one_out_advantages(reward_B: Tensor, *, group_size: int) -> Tensor:
    """RLOO: the reward minus the mean reward of the OTHER samples of its prompt.

        A_b = r_b - mean(r of the others in b's group) = n / (n - 1) (r_b - mean(r in b's group))

    Ahmadian et al. 2024, arXiv 2402.14740, section 3.3; Kool et al. 2019. n is the number of rewards in the group.
    Arguments, errors and the treatment of missing rewards are those of `group_advantages`.

    Returns:
        advantage_B: [B], dtype of reward_B, no gradient, in the reward's unit.
    """
    centered_PG, count_P1 = _centered(reward_B, group_size)
    return (centered_PG * count_P1 / (count_P1 - 1).clamp(min=1)).flatten().to(reward_B.dtype)


def greedy_baseline_advantages(reward_B: Tensor, greedy_reward_P: Tensor) -> Tensor:
    """ReMax: the reward minus that of the prompt's greedy response. Li et al. 2023, arXiv 2310.10505, algorithm 1.

    Args:
        reward_B: [B] floating; the same number of consecutive rows for each prompt.
        greedy_reward_P: [P] floating, one per prompt; P = B for one sample per prompt.

    Returns:
        advantage_B: [B], dtype of reward_B, no gradient, in the reward's unit; 0 where either reward is missing (NaN).

    Raises:
        ValueError: an infinite reward.
    """
    assert reward_B.ndim == 1 and greedy_reward_P.ndim == 1 and reward_B.is_floating_point()
    samples, left_over = divmod(len(reward_B), max(len(greedy_reward_P), 1))
    assert left_over == 0, f"{len(reward_B)} rewards are not the same number for each of {len(greedy_reward_P)} prompts"
    _refuse_infinite(reward_B)
    _refuse_infinite(greedy_reward_P)
    advantage_B = reward_B.detach().double() - greedy_reward_P.detach().double().repeat_interleave(samples)
    return torch.where(torch.isnan(advantage_B), 0.0, advantage_B).to(reward_B.dtype)


def reinforce_pp_advantages(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """REINFORCE++: the return of each token, before it is whitened over the global batch.

        A_t = sum of the rewards from t on;      then (A_t - mean) / std over all trained tokens of the global batch

    Hu 2025, arXiv 2501.03262, section 3, with a k1 KL penalty in the token rewards. The whitening needs statistics of
    all shards: apply `row_moments`, `mean_and_std` and `whiten` of aligner/objective/moments.py to the result.

    Args:
        reward_BT: [B, T] floating, from `kl_rewards`.
        mask_BT: [B, T] bool, the trained tokens; mask out rows without a reward, here and in the moments.
        gamma: discount factor per trained token; 1 in the paper.

    Returns:
        advantage_BT: [B, T], dtype of reward_BT, no gradient, not yet whitened, 0 outside the mask.
    """
    return returns_to_go(reward_BT, mask_BT, gamma=gamma)


def _centered(reward_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(rewards minus their group's mean, 0 where missing, [P, G]; rewards per group, [P, 1]); float64."""
    assert reward_B.ndim == 1, f"reward_B must be [B], got {tuple(reward_B.shape)}"
    assert reward_B.is_floating_point(), f"reward_B must be floating, since NaN means no reward; got {reward_B.dtype}"
    assert group_size >= 1 and reward_B.shape[0] % group_size == 0, (
        f"{reward_B.shape[0]} rows are not complete groups of {group_size}"
    )
    _refuse_infinite(reward_B)
    # float64: with a large common offset (say 1000.1) float32 would lose the differences between the samples.
    reward_PG = reward_B.detach().double().view(-1, group_size)
    valid_PG = ~torch.isnan(reward_PG)
    count_P1 = valid_PG.sum(dim=1, keepdim=True)
    # Relative to the group's best reward, so that equal rewards (and a single one) give exactly 0, not the mean's
    # rounding error.
    best_P1 = reward_PG.masked_fill(~valid_PG, -torch.inf).amax(dim=1, keepdim=True)
    reward_PG = torch.where(valid_PG, reward_PG - best_P1, 0.0)
    mean_P1 = reward_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
    return torch.where(valid_PG, reward_PG - mean_P1, 0.0), count_P1


def _refuse_infinite(reward_B: Tensor) -> None:
    if torch.isinf(reward_B).any():
        rows = torch.isinf(reward_B).nonzero().flatten().tolist()
        raise ValueError(f"the rewards of rows {rows} are infinite; return a finite reward, or raise to give none.")
