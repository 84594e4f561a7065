"""Rewards to advantages: how much better a sample is than the other samples of its prompt."""

from typing import Literal, get_args

import torch
from torch import Tensor

Normalize = Literal["std", "none"]


def has_reward(reward_B: Tensor) -> Tensor:
    """Which rows have a reward: `~isnan`. NaN stands for failed, timed out or unparsable, and is never a reward of 0.

    Clear such rows from the loss with `mask_BT & has_reward(reward_B)[:, None]`; otherwise their advantage of 0
    silences only the surrogate, while their KL and entropy terms and their share of the denominator stay.

    Returns:
        bool [B].
    """
    assert reward_B.ndim == 1, f"reward_B must be [B], got {tuple(reward_B.shape)}"
    return ~torch.isnan(reward_B)


def group_advantages(
    reward_B: Tensor, *, group_size: int, normalize: Normalize = "std", epsilon: float = 1e-4
) -> Tensor:
    """Group-relative advantages.

        A_b = (r_b - mean(r in b's group)) / (std(r in b's group) + epsilon)      normalize="std"
        A_b =  r_b - mean(r in b's group)                                         normalize="none"

    "std" is GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2); the paper does not say which standard deviation:
    as in the field's practice it is the sample one (n - 1) and epsilon is 1e-4. "none" is Dr. GRPO (Liu et al. 2025,
    arXiv 2503.20783), which drops the division because it weights up the prompts that are nearly solved or hopeless.

    A row without a reward (NaN) leaves: its advantage is 0 and it counts in neither the mean nor the deviation. A group
    with fewer than 2 rewards has nothing to compare, so all its advantages are 0; so are those of a group of equal
    rewards, exactly.

    Args:
        reward_B: [B] floating, in the reward's own unit; whole groups in order: row b belongs to group b // group_size.
        group_size: samples per prompt.
        epsilon: added to the deviation, in the reward's unit; unused with "none".

    Returns:
        advantage_B: [B], dtype of reward_B, no gradient, in standard deviations ("std") or the reward's unit ("none").

    Raises:
        ValueError: an unknown `normalize`, or an infinite reward, which would make its whole group NaN.
    """
    assert reward_B.ndim == 1, f"reward_B must be [B], got {tuple(reward_B.shape)}"
    assert reward_B.is_floating_point(), f"reward_B must be floating, since NaN means no reward; got {reward_B.dtype}"
    assert group_size >= 1 and reward_B.shape[0] % group_size == 0, (
        f"{reward_B.shape[0]} rows are not whole groups of {group_size}"
    )
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize={normalize!r} is not known; use one of {', '.join(get_args(Normalize))}.")
    if torch.isinf(reward_B).any():
        rows = torch.isinf(reward_B).nonzero().flatten().tolist()
        raise ValueError(f"the rewards of rows {rows} are infinite; return a finite reward, or raise for no reward.")

    # float64, because a common offset (say 1000.1) would otherwise cost the digits that tell the samples apart.
    reward_PG = reward_B.detach().double().view(-1, group_size)
    valid_PG = ~torch.isnan(reward_PG)
    count_P1 = valid_PG.sum(dim=1, keepdim=True)
    # Measured from the group's best reward, so that equal rewards, and a lone one, give exactly 0 and not a rounding
    # of the mean.
    best_P1 = reward_PG.masked_fill(~valid_PG, -torch.inf).amax(dim=1, keepdim=True)
    reward_PG = torch.where(valid_PG, reward_PG - best_P1, 0.0)
    mean_P1 = reward_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
    centered_PG = torch.where(valid_PG, reward_PG - mean_P1, 0.0)
    if normalize == "std":
        variance_P1 = centered_PG.square().sum(dim=1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        centered_PG = centered_PG / (variance_P1.sqrt() + epsilon)
    return centered_PG.flatten().to(reward_B.dtype)
