"""What loops do to batches of pairs and feedback, on rows written by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligner.data.pairs import (
    labels_of,
    margins_of,
    mask_unranked_pairs,
    mismatched,
    preferences_from_rewards,
    scores_of,
)
from aligner.data.samples import Samples, pad_rows

NAN = math.nan


def rows_of(*rows: tuple[list[int], list[int]], fields: list[dict[str, Any]] | None = None) -> Samples:
    """Prompt and answer of each row; every answer's tokens are trained."""
    return Samples(
        tokens_BT=pad_rows([prompt + answer for prompt, answer in rows], torch.long),
        prompt_len_B=torch.tensor([len(prompt) for prompt, _ in rows]),
        length_B=torch.tensor([len(prompt) + len(answer) for prompt, answer in rows]),
        mask_BT=pad_rows([[False] * len(prompt) + [True] * len(answer) for prompt, answer in rows], torch.bool),
        prompt_index_B=torch.arange(len(rows)),
        fields=fields or [{"row": row} for row in range(len(rows))],
    )


def known(*fields: dict[str, Any]) -> Samples:
    return rows_of(*[([1], [2])] * len(fields), fields=list(fields))


def test_scores_are_read_and_missing_ones_are_nan() -> None:
    scores_B = scores_of(known({"score": 1.5}, {}, {"score": None}, {"score": -2}))
    assert scores_B.dtype == torch.float32
    torch.testing.assert_close(scores_B, torch.tensor([1.5, NAN, NAN, -2.0]), equal_nan=True)
    assert scores_of(known({"helpful": 3}), "helpful").tolist() == [3.0]
    for wrong in ("high", True, [1]):
        with pytest.raises(ValueError, match=r"'score' must be a number in every row of data\.path"):
            scores_of(known({"score": 1}, {"score": wrong}))


def test_labels_are_all_there() -> None:
    labels_B = labels_of(known({"label": True}, {"label": False}))
    assert labels_B.dtype == torch.bool
    assert labels_B.tolist() == [True, False]
    for wrong in ({}, {"label": None}, {"label": 1}, {"label": "good"}):
        with pytest.raises(ValueError, match=r"'label' must be true or false in every row"):
            labels_of(known({"label": True}, wrong))


def test_a_margin_is_the_scores_difference_or_the_rows_own() -> None:
    samples = known({"score": 3}, {"score": 1.5}, {"margin": 0.25}, {"margin": 0.25}, {"score": 1}, {"score": 1})
    assert margins_of(samples).tolist() == [1.5, 1.5, 0.25, 0.25, 0.0, 0.0]
    with pytest.raises(
        ValueError, match=r"give each row .* 'score_chosen' and 'score_rejected', 'margin', .* has .'id'"
    ):
        margins_of(known({"score": 3}, {"score": 1}, {"id": 7}, {"id": 7}))


def test_the_higher_reward_is_preferred() -> None:
    reward_B = torch.tensor([1.0, 0.0, -2.0, 3.0, 0.5, 0.5, NAN, 1.0, 1.0, NAN])
    assert preferences_from_rewards(reward_B).tolist() == [1, -1, -1, 1, 0, 0, 0, 0, 0, 0]
    assert preferences_from_rewards(torch.tensor([1, 2])).tolist() == [-1.0, 1.0]
    assert preferences_from_rewards(torch.tensor([math.inf, -math.inf, math.inf, math.inf])).tolist() == [1, -1, 0, 0]
    assert preferences_from_rewards(torch.zeros(0)).shape == (0,)


@given(st.lists(st.tuples(*[st.floats(width=32) | st.just(NAN)] * 2), max_size=8))
def test_exchanging_two_answers_exchanges_their_ranks(rewards: list[tuple[float, float]]) -> None:
    forth = preferences_from_rewards(torch.tensor(rewards).flatten()).view(-1, 2)
    back = preferences_from_rewards(torch.tensor([pair[::-1] for pair in rewards]).flatten()).view(-1, 2)
    assert torch.equal(forth, back.flip(1))
    assert torch.equal(forth.sum(1), torch.zeros(len(rewards)))
    for (first, second), (rank, _) in zip(rewards, forth.tolist(), strict=True):
        assert rank == (first > second) - (first < second)


def test_pairs_without_a_preference_train_nothing() -> None:
    samples = rows_of(([1], [2]), ([1], [3, 4]), ([5], [6]), ([5], [7]))
    left = mask_unranked_pairs(samples, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    assert left.mask_BT.tolist() == [[False, True, False], [False, True, True], [False] * 3, [False] * 3]
    assert torch.equal(left.tokens_BT, samples.tokens_BT)
    assert mask_unranked_pairs(samples, torch.tensor([1.0, -1.0, 1.0, -1.0])) is samples


def test_each_prompt_gets_the_next_rows_answer() -> None:
    samples = rows_of(([1, 2, 3], [10]), ([4], [20, 21]), ([5, 6], [30, 31, 32]))
    samples.mask_BT[2, 3] = False  # an answer's token that is only read
    other = mismatched(samples)
    assert other.tokens_BT.tolist() == [[1, 2, 3, 20, 21], [4, 30, 31, 32, 0], [5, 6, 10, 0, 0]]
    assert other.mask_BT.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert (other.prompt_len_B.tolist(), other.length_B.tolist()) == ([3, 1, 2], [5, 4, 3])
    assert (other.fields, other.prompt_index_B.tolist()) == (samples.fields, [0, 1, 2])


def test_an_answer_to_the_same_prompt_is_no_mismatch() -> None:
    """Both answers of a preference, next to each other."""
    samples = rows_of(([1], [10]), ([1], [11]), ([2], [20]), ([2], [21]))
    assert mismatched(samples).tokens_BT.tolist() == [[1, 20], [1, 20], [2, 10], [2, 10]]
    alike = rows_of(([1], [10]), ([1], [11]))
    assert mismatched(alike).tokens_BT.tolist() == [[1, 11], [1, 10]]


def test_answers_are_cut_where_the_model_ends() -> None:
    samples = rows_of(([1, 2, 3], [10]), ([4], [20, 21, 22]))
    other = mismatched(samples, max_tokens=4)
    assert other.tokens_BT.tolist() == [[1, 2, 3, 20], [4, 10, 0, 0]]
    assert other.mask_BT.int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert other.length_B.tolist() == [4, 2]
    with pytest.raises(ValueError, match=r"needs two rows in a batch; use data\.prompts_per_step=2 or more"):
        mismatched(rows_of(([1], [2])))
