"""Credit for the turns of an episode: where its rewards fall, group-relative advantages per turn, GAE with turns as time steps.

`turn_BT` is `Samples.turn_BT`: the number (from 1) of the turn that sampled each token. Of single-turn rows it may be the mask as a
number: then each function is what it is without turns.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from aligner.objective.advantages import Normalize, group_advantages
from aligner.objective.masked import apply_mask, check_rows, check_tokens
from aligner.objective.token_rewards import check_discount, place_rewards

Compare = Literal["turn", "group"]
Baseline = Literal["turn", "token"]


def turn_group_advantages(
    reward_B: Tensor,
    *,
    mask_BT: Tensor,
    turn_BT: Tensor,
    turn_reward_BT: Tensor | None = None,
    group_size: int,
    gamma: float = 1.0,
    compare: Compare = "turn",
    normalize: Normalize = "std",
    epsilon: float = 1e-4,
) -> Tensor:
    """Turn-level GRPO: group-relative advantages of the discounted return from each turn on.

        R_k = r_k + gamma R_{k+1},  where r_k is the reward of turn k; what the row's reward is more than their sum falls to the last turn
        A_k = (R_k - mean(R)) / (std(R) + epsilon)    over turn k of the group's episodes (compare="turn"), or all their turns ("group")

    The group baseline is that of Shao et al. 2024, arXiv 2402.03300, section 4.1.2, for the returns of turns in place of rewards of
    episodes; of turns with the same number as in Zeng et al. 2025 (MT-GRPO), arXiv 2505.11821, with discounted returns as in Feng
    et al. 2025 (GiGPO), arXiv 2505.10978. An episode's first turn is always comparable; with compare="turn" a turn that
    one episode of the group alone reached has an advantage of 0. A turn without a trained token is skipped. Rows of one turn get `group_advantages`, to the last bit.

    Args:
        reward_B: [B] floating, the episodes' rewards; complete groups in order. NaN: no reward, see `group_advantages`.
        mask_BT: [B, T] bool, the trained tokens.
        turn_BT: [B, T] integer, the turn of each trained token, from 1.
        turn_reward_BT: [B, T], what came after a turn, at its last token; None: the rows' rewards come after their last turns.
        gamma: discount factor per turn.
        normalize, epsilon: see `group_advantages`.

    Returns:
        advantage_BT: [B, T], dtype of reward_B, no gradient: each turn's on its trained tokens, 0 elsewhere.

    Raises:
        ValueError: a setting out of range, or an infinite reward.
    """
    if compare not in get_args(Compare):
        raise ValueError(f"compare={compare!r} is unknown; use one of {', '.join(get_args(Compare))}.")
    check_discount("gamma", gamma)
    reward_BK = turn_rewards(reward_B, mask_BT=mask_BT, turn_BT=turn_BT, turn_reward_BT=turn_reward_BT)
    return_BK = torch.empty_like(reward_BK)
    following_B = reward_BK.new_zeros(len(reward_BK))
    for k in reversed(range(reward_BK.shape[1])):
        return_BK[:, k] = (
            reward_BK[:, k] + gamma * following_B
        )  # NaN where there is no such turn, or none of it is trained
        following_B = torch.where(return_BK[:, k].isnan(), following_B, return_BK[:, k])
    settings = {"normalize": normalize, "epsilon": epsilon}
    if compare == "turn":
        columns = [group_advantages(return_B, group_size=group_size, **settings) for return_B in return_BK.unbind(1)]  # type: ignore[arg-type]
        advantage_BK = torch.stack(columns, dim=1)
    else:
        size = group_size * return_BK.shape[1]
        advantage_BK = group_advantages(return_BK.flatten(), group_size=size, **settings).view_as(return_BK)  # type: ignore[arg-type]
    return _on_tokens(advantage_BK, mask_BT, turn_BT).to(reward_B.dtype)


def process_advantages(
    reward_B: Tensor,
    *,
    mask_BT: Tensor,
    turn_BT: Tensor,
    turn_reward_BT: Tensor | None = None,
    group_size: int,
    normalize: Normalize = "std",
    epsilon: float = 1e-4,
) -> Tensor:
    """GRPO with process supervision, a turn being a step: normalised rewards of the turns, summed from each turn on.

        A_k = sum over j >= k of (r_j - mean(r)) / (std(r) + epsilon),  mean and std over all turns of the group

    Shao et al. 2024, arXiv 2402.03300, section 4.1.3. Arguments, returns and errors are those of `turn_group_advantages`.
    """
    reward_BK = turn_rewards(reward_B, mask_BT=mask_BT, turn_BT=turn_BT, turn_reward_BT=turn_reward_BT)
    size = group_size * reward_BK.shape[1]
    scaled_BK = group_advantages(reward_BK.flatten(), group_size=size, normalize=normalize, epsilon=epsilon)
    summed_BK = scaled_BK.view_as(reward_BK).flip(1).cumsum(1).flip(1)
    return _on_tokens(summed_BK, mask_BT, turn_BT).to(reward_B.dtype)


def turn_rewards(reward_B: Tensor, *, mask_BT: Tensor, turn_BT: Tensor, turn_reward_BT: Tensor | None) -> Tensor:
    """The reward of each turn; what the row's reward is more than their sum falls to its last turn.

    Returns:
        [B, K] float64, K the largest number of turns; NaN where a row has no such turn with a trained token, or no reward.
    """
    check_rows("reward_B", reward_B, len(mask_BT))
    assert turn_BT.shape == mask_BT.shape and not turn_BT.is_floating_point(), (
        f"{tuple(turn_BT.shape)}, {turn_BT.dtype}"
    )
    number_BT = torch.where(mask_BT, turn_BT, 0).long()
    assert bool((number_BT > 0).eq(mask_BT).all()), "a trained token belongs to no turn"
    turns = int(number_BT.max()) if number_BT.numel() else 0
    reward_BT = place_rewards(reward_B, mask_BT=mask_BT, turn_reward_BT=turn_reward_BT)
    shape = (len(mask_BT), max(turns, 1) + 1)  # column 0 collects what is in no turn
    reward_BK = reward_BT.new_zeros(shape).scatter_add(1, number_BT, reward_BT)[:, 1:]
    tokens_BK = reward_BT.new_zeros(shape).scatter_add(1, number_BT, mask_BT.double())[:, 1:]
    return reward_BK.masked_fill((tokens_BK == 0) | torch.isnan(reward_B)[:, None], torch.nan)


def _on_tokens(value_BK: Tensor, mask_BT: Tensor, turn_BT: Tensor) -> Tensor:
    """[B, K] values of turns -> [B, T]: each turn's on its trained tokens, 0 elsewhere."""
    return apply_mask(mask_BT, value_BK.gather(1, torch.where(mask_BT, turn_BT - 1, 0).long()))


def turn_gae(
    reward_BT: Tensor,
    value_BT: Tensor,
    mask_BT: Tensor,
    *,
    turn_BT: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    baseline: Baseline = "turn",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with turns as time steps: discounts and bootstrapping at turn ends only.

        delta_k = r_k + gamma V_{k+1} - V_k          r_k: sum of the turn's token rewards; V_k: of the state before its first token
        A_k     = delta_k + gamma lam A_{k+1}        V and A are 0 after the last turn

    Li et al. 2025 (Turn-PPO), arXiv 2512.17008: a whole turn is one action, and the next state is that before the next
    turn's first token, with what the environment said. baseline="turn" gives every token of a turn A_k; "token" subtracts the
    value before that token in place of V_k, which agrees on the first token and varies less where the critic knows what the turn so
    far is worth.

    The critic's target for a token is the return from there on, R_t = (rewards from t to the turn's end) + gamma (V_{k+1} + lam A_{k+1}).

    Args:
        reward_BT, value_BT, mask_BT: see `aligner.objective.values.gae`.
        turn_BT: [B, T] integer, the turn of each trained token, ascending.
        gamma, lam: discount factors per turn.

    Returns:
        advantage_BT, return_BT: [B, T], dtype of value_BT, no gradient, 0 outside the mask.

    Raises:
        ValueError: a setting out of range.
    """
    check_tokens("value_BT", value_BT, mask_BT, reward_BT)
    assert turn_BT.shape == mask_BT.shape, f"turn_BT is {tuple(turn_BT.shape)}"
    check_discount("gamma", gamma)
    check_discount("lam", lam)
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline={baseline!r} is unknown; use one of {', '.join(get_args(Baseline))}.")
    reward_TB = apply_mask(mask_BT, reward_BT.detach().double()).T
    value_TB = apply_mask(mask_BT, value_BT.detach().double()).T
    return_TB = torch.zeros_like(value_TB)
    ahead_B = value_TB.new_zeros(len(value_BT))  # the rest of this turn's return
    beyond_B = value_TB.new_zeros(len(value_BT))  # gamma (V + lam A) of the turn after it
    first_value_B = value_TB.new_zeros(len(value_BT))
    turn_B = torch.zeros(len(value_BT), dtype=turn_BT.dtype, device=turn_BT.device)  # of the trained token after t
    for t in reversed(range(len(value_TB))):
        trained_B = mask_BT[:, t]
        ends_turn_B = trained_B & (turn_BT[:, t] != turn_B)
        begun_B = gamma * (first_value_B + lam * (ahead_B - first_value_B))
        beyond_B = torch.where(ends_turn_B & (turn_B > 0), begun_B, beyond_B)
        ahead_B = torch.where(trained_B, reward_TB[t] + torch.where(ends_turn_B, beyond_B, ahead_B), ahead_B)
        first_value_B = torch.where(trained_B, value_TB[t], first_value_B)
        turn_B = torch.where(trained_B, turn_BT[:, t], turn_B)
        return_TB[t] = ahead_B
    return_BT = apply_mask(mask_BT, return_TB.T)
    advantage_BT = return_BT - value_TB.T
    if baseline == "turn":
        advantage_BT = _of_first_token(advantage_BT, mask_BT, turn_BT)
    return advantage_BT.to(value_BT.dtype), return_BT.to(value_BT.dtype)


def _of_first_token(value_BT: Tensor, mask_BT: Tensor, turn_BT: Tensor) -> Tensor:
    """Each turn's value at its first trained token, on all of its trained tokens; 0 elsewhere."""
    place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    number_BT = torch.where(mask_BT, turn_BT, 0).long()
    turns = int(number_BT.max()) if number_BT.numel() else 0
    beyond = mask_BT.shape[1]
    first_BK = torch.full((len(mask_BT), turns + 1), beyond, device=mask_BT.device)
    first_BK = first_BK.scatter_reduce(1, number_BT, torch.where(mask_BT, place_T, beyond), "amin")
    first_BT = first_BK.gather(1, number_BT).clamp(max=max(beyond - 1, 0))
    return apply_mask(mask_BT, value_BT.gather(1, first_BT))
