"""Rewards to advantages: how much better a sample is than what was to be expected of its prompt."""

from typing import Literal, get_args

import torch
from torch import Tensor

from aligner.objective.token_rewards import returns_to_go

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


def has_signal(reward_B: Tensor, *, group_size: int) -> Tensor:
    """Which rows are of a group whose rewards differ: the others have advantages of 0 and teach nothing.

    The condition of dynamic sampling: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2, equation 11, where with
    rewards of 0 and 1 it reads 0 < right answers < group size.

    Args:
        reward_B: [B] floating; whole groups in order. NaN (no reward) is not a difference.

    Returns:
        bool [B], the same for every row of a group, so that groups stay whole.
    """
    centered_PG, _ = _centered(reward_B, group_size)
    return (centered_PG != 0).any(dim=1).repeat_interleave(group_size)


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
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize={normalize!r} is not known; use one of {', '.join(get_args(Normalize))}.")
    centered_PG, count_P1 = _centered(reward_B, group_size)
    if normalize == "std":
        variance_P1 = centered_PG.square().sum(dim=1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        centered_PG = centered_PG / (variance_P1.sqrt() + epsilon)
    return centered_PG.flatten().to(reward_B.dtype)


def leave_one_out_advantages(reward_B: Tensor, *, group_size: int) -> Tensor:
    """RLOO: the reward less the mean reward of the OTHER samples of its prompt.

        A_b = r_b - mean(r of the others in b's group) = n / (n - 1) (r_b - mean(r in b's group))

    Ahmadian et al. 2024, arXiv 2402.14740, section 3.3; Kool et al. 2019. n is the number of rewards in the group.

    Arguments, errors, and rows and groups without rewards are as in `group_advantages`.

    Returns:
        advantage_B: [B], dtype of reward_B, no gradient, in the reward's unit.
    """
    centered_PG, count_P1 = _centered(reward_B, group_size)
    return (centered_PG * count_P1 / (count_P1 - 1).clamp(min=1)).flatten().to(reward_B.dtype)


def greedy_baseline_advantages(reward_B: Tensor, greedy_reward_P: Tensor) -> Tensor:
    """ReMax: the reward less that of the prompt's greedy response: Li et al. 2023, arXiv 2310.10505, algorithm 1.

    Args:
        reward_B: [B] floating; the same number of consecutive rows for each of the prompts.
        greedy_reward_P: [P] floating, one for each prompt; P = B with one sample a prompt.

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
    """REINFORCE++: the return to go, whose baseline and scale are those of the whole global batch.

        A_t = sum of the rewards from t on;      then (A_t - mean) / std over every trained token of the global batch

    Hu 2025, arXiv 2501.03262, section 3, with the KL in the reward, k1 a token. The second half takes numbers that no
    shard has: hand the result to `row_moments`, `combine` and `whiten` of aligner/objective/moments.py.

    Args:
        reward_BT: [B, T] floating, from `kl_rewards`.
        mask_BT: [B, T] bool, the trained tokens; clear rows without a reward from it, here as in the moments.
        gamma: discount a trained token; the paper's is 1.

    Returns:
        advantage_BT: [B, T], dtype of reward_BT, no gradient, not yet whitened, 0 outside the mask.
    """
    return returns_to_go(reward_BT, mask_BT, gamma=gamma)


def _centered(reward_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean, 0 where there is none, [P, G], and how many a group has, [P, 1]; in float64."""
    assert reward_B.ndim == 1, f"reward_B must be [B], got {tuple(reward_B.shape)}"
    assert reward_B.is_floating_point(), f"reward_B must be floating, since NaN means no reward; got {reward_B.dtype}"
    assert group_size >= 1 and reward_B.shape[0] % group_size == 0, (
        f"{reward_B.shape[0]} rows are not whole groups of {group_size}"
    )
    _refuse_infinite(reward_B)
    # float64, because a common offset (say 1000.1) would otherwise cost the digits that tell the samples apart.
    reward_PG = reward_B.detach().double().view(-1, group_size)
    valid_PG = ~torch.isnan(reward_PG)
    count_P1 = valid_PG.sum(dim=1, keepdim=True)
    # Measured from the group's best reward, so that equal rewards, and a lone one, give exactly 0 and not a rounding
    # of the mean.
    best_P1 = reward_PG.masked_fill(~valid_PG, -torch.inf).amax(dim=1, keepdim=True)
    reward_PG = torch.where(valid_PG, reward_PG - best_P1, 0.0)
    mean_P1 = reward_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
    return torch.where(valid_PG, reward_PG - mean_P1, 0.0), count_P1


def _refuse_infinite(reward_B: Tensor) -> None:
    if torch.isinf(reward_B).any():
        rows = torch.isinf(reward_B).nonzero().flatten().tolist()
        raise ValueError(f"the rewards of rows {rows} are infinite; return a finite reward, or raise for no reward.")
