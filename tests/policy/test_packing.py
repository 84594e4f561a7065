"""Packed rows against padded ones, the token budget, and the schedule by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligner.policy.config import OptimizerConfig
from aligner.policy.packing import microbatches, pack
from aligner.policy.schedule import learning_rate


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(10, 200))
def test_microbatches_hold_every_row_within_budget(lengths: list[int], budget: int) -> None:
    found = microbatches(lengths, budget)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= budget or len(rows) == 1 for rows in found)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=20), st.integers(10, 200), st.integers(1, 4))
def test_rows_that_belong_together_stay_together(groups: list[int], budget: int, together: int) -> None:
    lengths = [length for length in groups for _ in range(together)]
    found = microbatches(lengths, budget, together)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    for rows in found:
        firsts = rows[::together]
        assert all(first % together == 0 for first in firsts)
        assert rows == [first + place for first in firsts for place in range(together)]
        assert sum(lengths[row] for row in rows) <= budget or len(rows) == together


def test_pairs_by_hand() -> None:
    # pairs of 12, 9 and 4 tokens, by their longest row 7, 8 and 2: the second pair comes first
    assert microbatches([5, 7, 8, 1, 2, 2], 16, 2) == [[2, 3], [0, 1, 4, 5]]
    assert microbatches([5, 7, 8, 1, 2, 2], 16) == [[2, 1], [0, 4, 5, 3]]


def test_pack_by_hand() -> None:
    tokens_BT = torch.tensor([[5, 6, 7], [8, 9, 0]])
    packed = pack(tokens_BT, torch.tensor([3, 2]), 4, torch.device("cpu"))
    assert packed.tokens_T.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert packed.targets_T.tolist() == [6, 7, 0, 9, 0, 0, 0, 0]
    assert packed.lengths.tolist() == [3, 2, 3]  # the padding is a row of its own
    assert packed.last_N.tolist() == [2, 4] and packed.row_N.tolist() == [0, 1]
    # predictions 0,1 of row 0 are of its tokens 1,2; prediction 3 (row 1) is of its token 1
    rows_BT = packed.to_rows(torch.arange(8.0) + 10)
    assert rows_BT.tolist() == [[0, 10, 11], [0, 13, 0]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 4))
def test_targets_are_the_next_tokens(lengths: list[int], multiple_of: int) -> None:
    tokens_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens_BT[row, :n] = torch.arange(1, n + 1) + 100 * row
    packed = pack(tokens_BT, torch.tensor(lengths), multiple_of, torch.device("cpu"))
    assert packed.tokens_T.numel() % multiple_of == 0
    assert int(packed.lengths.sum()) == packed.tokens_T.numel()
    back_BT = packed.to_rows(packed.targets_T.double())
    expected_BT = tokens_BT.double().clone()
    expected_BT[:, 0] = 0  # nothing predicts a first token
    assert torch.equal(back_BT, expected_BT)


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        (OptimizerConfig(lr=1.0), 7, 1.0),
        (OptimizerConfig(lr=1.0, warmup_steps=4), 0, 0.25),
        (OptimizerConfig(lr=1.0, warmup_steps=4), 3, 1.0),
        (OptimizerConfig(lr=2.0, schedule="linear", min_lr_ratio=0.5), 50, 2.0 * (0.5 + 0.5 * 0.5)),
        (OptimizerConfig(lr=1.0, schedule="cosine", decay_steps=40), 10, (1 + math.cos(math.pi / 4)) / 2),
        (OptimizerConfig(lr=1.0, schedule="cosine", min_lr_ratio=0.1, decay_steps=40), 99, 0.1),
    ],
)
def test_learning_rate_by_hand(config: OptimizerConfig, step: int, expected: float) -> None:
    assert learning_rate(config, step, total_steps=100) == pytest.approx(expected, rel=1e-12)
