"""Call the advantage function of a loop with what it takes: rewards per row, or with turns per token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aligner.data.samples import Samples, leave_out_unscored
from aligner.objective.advantages import has_advantage, has_signal
from aligner.objective.masked import apply_mask


def is_per_token(advantages: Callable[..., Any]) -> bool:
    """Whether a group-relative advantage function takes `turn_BT` and returns [B, T], rather than [B] of the rows' rewards."""
    return "turn_BT" in inspect.signature(advantages).parameters


def group_relative(samples: Samples, reward_B: Tensor, advantages: Callable[..., Tensor], group_size: int) -> Tensor:
    """`advantages(reward_B, group_size=...)`, with those of mask_BT, turn_BT and turn_reward_BT that it takes by name.

    Returns:
        [B], or [B, T] of a function that takes turns.
    """
    return advantages(reward_B, group_size=group_size, **_taken(advantages, samples))


def rows_with_signal(
    samples: Samples, reward_B: Tensor, advantages: Callable[..., Any] | None, group_size: int
) -> Tensor:
    """Which rows belong to a group that dynamic sampling keeps: its rewards differ, or, with advantages of turns, one of them is
    not 0 (where a turn earns in one episode what another turn earns in the next, the sums are equal).

    Args:
        advantages: of a loop, as `group_relative` takes it; None: rewards count.

    Returns:
        bool [B], the same for all rows of a group.
    """
    if advantages is None or not is_per_token(advantages):
        return has_signal(reward_B, group_size=group_size)
    advantage_BT = group_relative(leave_out_unscored(samples, reward_B), reward_B, advantages, group_size)
    return has_advantage(advantage_BT, group_size=group_size)


def critic_estimates(
    advantages: Callable[..., tuple[Tensor, Tensor]],
    reward_BT: Tensor,
    value_BT: Tensor,
    samples: Samples,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """(advantage_BT, return_BT) by `gae`, or by a function of its form that also takes turn_BT."""
    taken = _taken(advantages, samples)
    taken.pop("mask_BT", None)
    return advantages(reward_BT, value_BT, samples.mask_BT, gamma=gamma, lam=lam, **taken)


def broadcast_to_tokens(advantage: Tensor, samples: Samples) -> Tensor:
    """[B] -> [B, T]: each row's advantage on its trained tokens, 0 elsewhere; [B, T] as it is."""
    return advantage if advantage.dim() == 2 else apply_mask(samples.mask_BT, advantage[:, None])


def two_turns(rows: int) -> Samples:
    """Rows of two turns, to try a function on."""
    turn_BT = torch.tensor([[0, 1, 0, 2]], dtype=torch.int32).expand(rows, 4)
    length_B = torch.full((rows,), 4)
    return Samples(
        turn_BT.long(), length_B // 4, length_B, turn_BT > 0, torch.arange(rows), [{}] * rows, turn_BT=turn_BT
    )


def _taken(function: Callable[..., Any], samples: Samples) -> dict[str, Any]:
    names: Mapping[str, Any] = inspect.signature(function).parameters
    given = {
        "mask_BT": samples.mask_BT,
        "turn_BT": samples.mask_BT.int() if samples.turn_BT is None else samples.turn_BT,
        "turn_reward_BT": samples.turn_reward_BT,
    }
    return {name: value for name, value in given.items() if name in names}
