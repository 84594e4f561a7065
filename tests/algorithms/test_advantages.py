"""Advantage functions get what they take by name; rewards of turns reach token rewards; single-turn samples are one turn."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from aligner.algorithms.advantages import (
    broadcast_to_tokens,
    critic_estimates,
    group_relative,
    is_per_token,
    rows_with_signal,
    two_turns,
)
from aligner.algorithms.ppo import token_rewards
from aligner.objective.advantages import group_advantages, leave_one_out_advantages
from aligner.objective.turns import turn_gae, turn_group_advantages
from aligner.objective.values import gae
from tests.trainer.episodes import Episode, as_samples

SAMPLES = replace(
    as_samples(
        [
            Episode([([1, 2], 0), ([10, 11], 1), ([4], 0), ([12], 2)]),
            Episode([([1, 2], 0), ([20], 1), ([6], 0)]),
        ],
        torch.zeros(2, 6),
    ),
    turn_reward_BT=torch.tensor([[0, 0, 0, 2.0, 0, 0], [0, 0, 1.0, 0, 0, 0]]),
)
REWARD_B = torch.tensor([3.0, 1.0])


def test_who_takes_turns() -> None:
    assert is_per_token(functools.partial(turn_group_advantages, gamma=0.9))
    assert not is_per_token(group_advantages) and not is_per_token(functools.partial(leave_one_out_advantages))


def test_each_function_gets_what_it_takes() -> None:
    rows = group_relative(SAMPLES, REWARD_B, functools.partial(group_advantages, normalize="none"), 2)
    assert rows.tolist() == [1.0, -1.0]
    # returns of turn 1: 2 + 1 of the second turn, and 1; the second turn is the first episode's alone
    turns = group_relative(SAMPLES, REWARD_B, functools.partial(turn_group_advantages, normalize="none"), 2)
    assert turns.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, -1, 0, 0, 0]]
    assert broadcast_to_tokens(rows, SAMPLES).tolist() == [[0, 0, 1, 1, 0, 1], [0, 0, -1, 0, 0, 0]]
    assert broadcast_to_tokens(turns, SAMPLES) is turns


def test_dynamic_sampling_keeps_groups_whose_turns_differ() -> None:
    """Three groups of two episodes of two turns: one order of the rewards and the other; twice the same; a failed one."""
    turn_reward_BT = torch.zeros(6, 4)
    for row, (first, second) in enumerate([(0.1, 0.2), (0.2, 0.1), (0.1, 0.2), (0.1, 0.2), (0.1, 0.2), (0.2, 0.1)]):
        turn_reward_BT[row, 1], turn_reward_BT[row, 3] = first, second
    samples = replace(two_turns(6), turn_reward_BT=turn_reward_BT)
    reward_B = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, torch.nan])
    by_turn = functools.partial(turn_group_advantages, gamma=1.0)
    assert rows_with_signal(samples, reward_B, by_turn, 2).tolist() == [True] * 2 + [False] * 4
    assert rows_with_signal(samples, reward_B, group_advantages, 2).tolist() == [False] * 6
    assert rows_with_signal(samples, reward_B, None, 2).tolist() == [False] * 6
    # one turn with both rewards: the returns of the first turn are equal but for rounding, and the second has none beside it
    alone = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 2]], dtype=torch.int32)
    pair = replace(two_turns(2), turn_BT=alone, mask_BT=alone > 0)
    pair = replace(pair, turn_reward_BT=torch.tensor([[0, 0.3, 0, 0], [0, 0.1, 0, 0.2]]))
    assert rows_with_signal(pair, torch.tensor([0.3, 0.3]), by_turn, 2).tolist() == [False] * 2
    assert rows_with_signal(pair, torch.tensor([0.3, 0.4]), by_turn, 2).tolist() == [True] * 2


def test_samples_without_turns_are_one_turn() -> None:
    plain = replace(SAMPLES, turn_BT=None, turn_reward_BT=None)
    turns = group_relative(plain, REWARD_B, functools.partial(turn_group_advantages, normalize="none"), 2)
    assert turns.tolist() == [[0, 0, 1, 1, 0, 1], [0, 0, -1, 0, 0, 0]]


def test_rewards_of_turns_reach_the_tokens() -> None:
    reward_BT = token_rewards(SAMPLES, REWARD_B, None, 0.0, 2.0, 10.0)
    assert reward_BT.tolist() == [[0, 0, 0, 1, 0, 0.5], [0, 0, 0.5, 0, 0, 0]]
    plain = replace(SAMPLES, turn_reward_BT=None)
    assert token_rewards(plain, REWARD_B, None, 0.0, 1.0, 2.0)[0].tolist() == [0, 0, 0, 0, 0, 2]


def test_a_critic_s_estimates_by_token_and_by_turn() -> None:
    reward_BT = token_rewards(SAMPLES, REWARD_B, None, 0.0, 1.0, 10.0)
    value_BT = torch.tensor([[9, 9, 1.0, 4.0, 9, 3.0], [9, 9, 2.0, 9, 9, 9]])
    by_token, returns = critic_estimates(gae, reward_BT, value_BT, SAMPLES, 1.0, 0.0)
    # TD errors: 4 - 1, 2 + 3 - 4, 1 - 3
    assert by_token[0].tolist() == [0, 0, 3, 1, 0, -2] and returns[0].tolist() == [0, 0, 4, 5, 0, 1]
    by_turn, returns = critic_estimates(turn_gae, reward_BT, value_BT, SAMPLES, 1.0, 0.0)
    # of turns: 2 + 3 - 1, 1 - 3
    assert by_turn[0].tolist() == [0, 0, 4, 4, 0, -2] and returns[0].tolist() == [0, 0, 5, 5, 0, 1]


def test_the_samples_that_functions_are_tried_on_have_two_turns() -> None:
    tried: Tensor | None = two_turns(3).turn_BT
    assert tried is not None and tried.tolist() == [[0, 1, 0, 2]] * 3
