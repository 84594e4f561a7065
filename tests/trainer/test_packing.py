"""Packed rows against padded ones, the token budget, and the schedule by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligner.spmd.cost import TOKENS, Cost
from aligner.trainer.config import OptimizerConfig
from aligner.trainer.packed_attention import shared_calls
from aligner.trainer.packing import Keep, Unit, even_microbatches, microbatches, pack, row_units
from aligner.trainer.prefix_attention import attended
from aligner.trainer.row_contexts import separate, whole_rows
from aligner.trainer.schedule import learning_rate


def unshared(lengths: list[int], budget: int, together: int = 1, cost: Cost = TOKENS) -> list[Unit]:
    return row_units(separate(whole_rows(torch.tensor(lengths))), budget, together, cost)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(10, 200))
def test_microbatches_hold_every_row_within_budget(lengths: list[int], budget: int) -> None:
    found = microbatches(unshared(lengths, budget), budget)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= budget or len(rows) == 1 for rows in found)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=20), st.integers(10, 200), st.integers(1, 4))
def test_rows_that_belong_together_stay_together(groups: list[int], budget: int, together: int) -> None:
    lengths = [length for length in groups for _ in range(together)]
    found = microbatches(unshared(lengths, budget, together), budget)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    for rows in found:
        firsts = rows[::together]
        assert all(first % together == 0 for first in firsts)
        assert rows == [first + place for first in firsts for place in range(together)]
        assert sum(lengths[row] for row in rows) <= budget or len(rows) == together


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(90, 200))
def test_few_microbatches(lengths: list[int], budget: int) -> None:
    least = math.ceil(sum(lengths) / budget)
    # first fit leaves at most one microbatch half empty
    assert len(microbatches(unshared(lengths, budget), budget)) <= 2 * least


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=20), st.integers(10, 200), st.integers(1, 3), st.integers(0, 6)
)
def test_even_microbatches_are_as_many_as_asked_for(lengths: list[int], budget: int, together: int, more: int) -> None:
    rows, cost = [length for length in lengths for _ in range(together)], Cost(90, 1)
    count = len(microbatches(unshared(rows, budget, together), budget)) + more
    found = even_microbatches(unshared(rows, budget, together, cost), budget, count)
    assert len(found) == count
    assert sorted(row for batch in found for row in batch) == list(range(len(rows)))
    assert sum(1 for batch in found if batch) >= min(count, len(lengths)), "empty though there are rows left"
    for batch in found:
        assert len({row // together for row in batch}) * together == len(batch), "a group is split"
        assert sum(rows[row] for row in batch) <= budget or len(batch) == together
    costs = [sum(cost.of(rows[row]) for row in batch) for batch in found]
    assert costs == sorted(costs, reverse=True)


def test_packed_by_hand() -> None:
    # pairs of 12, 9 and 4 tokens: the 4 fit in beside the 12
    assert microbatches(unshared([5, 7, 8, 1, 2, 2], 16, 2), 16) == [[0, 1, 4, 5], [2, 3]]
    # 8 + 7, then 5 + 2 + 2 + 1 in a second one, where 1 also fits in the first
    assert microbatches(unshared([5, 7, 8, 1, 2, 2], 16), 16) == [[2, 1, 3], [0, 4, 5]]
    # three of equal tokens: 7 + 2, 8, and 5 + 2 + 1
    assert even_microbatches(unshared([5, 7, 8, 1, 2, 2], 16), 16, 3) == [[1, 5], [2], [0, 4, 3]]
    # squares: 25 + 9 and 16 + 16
    assert even_microbatches(unshared([5, 4, 4, 3], 9, 1, Cost(0, 1)), 9, 2) == [[0, 3], [1, 2]]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=80))
def test_rows_share_calls_with_little_padding(lengths: list[int]) -> None:
    calls = shared_calls(tuple(lengths))
    assert sorted(row for call in calls for row in call) == list(range(len(lengths)))
    for call in calls:
        assert lengths[call[0]] == max(lengths[row] for row in call)
    padded = sum(lengths[call[0]] - lengths[row] for call in calls for row in call)
    assert padded <= 0.03 * sum(lengths)
    assert attended(tuple(lengths), (-1,) * len(lengths)) == sum(lengths) + padded


def test_skewed_lengths_share_calls() -> None:
    """A long tail, 32 times the median: padding below 3%, with many rows in a call."""
    draw = random.Random(0)
    lengths = [max(1, min(2048, int(64 * draw.lognormvariate(0, 1)))) for _ in range(512)]
    batches = [tuple(lengths[row] for row in batch) for batch in microbatches(unshared(lengths, 4096), 4096)]
    assert 1 - sum(lengths) / sum(attended(batch, (-1,) * len(batch)) for batch in batches) < 0.03
    assert sum(len(shared_calls(batch)) for batch in batches) < 512 / 3
    assert len(batches) <= math.ceil(sum(lengths) / 4096) + 1


def test_pack_by_hand() -> None:
    tokens_BT = torch.tensor([[5, 6, 7], [8, 9, 0]])
    packed = pack(tokens_BT, whole_rows(torch.tensor([3, 2])), 4, torch.device("cpu"))
    assert packed.tokens_T.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert packed.source_N.tolist() == [0, 1, 3] and packed.predicted_N.tolist() == [6, 7, 9]
    assert packed.segments_S2.tolist() == [[3, -1], [2, -1], [3, -1]]  # the padding is a row of its own
    assert packed.last_N.tolist() == [2, 4] and packed.row_N.tolist() == [0, 1]
    # predictions 0,1 of row 0 are of its tokens 1,2; prediction 3 (row 1) is of its token 1
    rows_BT = packed.to_rows((torch.arange(8.0) + 10)[packed.source_N])
    assert rows_BT.tolist() == [[0, 10, 11], [0, 13, 0]]


def test_only_wanted_predictions_by_hand() -> None:
    tokens_BT = torch.tensor([[5, 6, 7], [8, 9, 0], [4, 3, 2]])
    wanted_BT = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])
    packed = pack(tokens_BT, whole_rows(torch.tensor([3, 2, 3])), 1, torch.device("cpu"), wanted_BT=wanted_BT)
    # token 2 of row 0 is predicted by its token 1, token 1 of row 2 by its token 0; nothing predicts what is beyond a row
    assert packed.source_N.tolist() == [1, 5] and packed.predicted_N.tolist() == [7, 3]
    assert packed.to_rows(torch.tensor([1.0, 2.0])).tolist() == [[0, 0, 1], [0, 0, 0], [0, 2, 0]]
    assert packed.last_N.tolist() == [2, 4, 7], "rows' scores are read at their ends whatever is wanted"


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 4))
def test_targets_are_the_next_tokens(lengths: list[int], multiple_of: int) -> None:
    tokens_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens_BT[row, :n] = torch.arange(1, n + 1) + 100 * row
    packed = pack(tokens_BT, whole_rows(torch.tensor(lengths)), multiple_of, torch.device("cpu"))
    assert packed.tokens_T.numel() % multiple_of == 0
    assert int(packed.segments_S2[:, 0].sum()) == packed.tokens_T.numel()
    back_BT = packed.to_rows(packed.predicted_N.double())
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


@pytest.mark.parametrize("keep", list(Keep))
def test_the_last_layer_goes_on_with_what_the_readout_uses(keep: Keep) -> None:
    tokens_BT = torch.tensor([[5, 6, 7, 8], [8, 9, 3, 0]])
    wanted_BT = torch.tensor([[False, False, False, True], [False, False, True, True]])
    packed = pack(tokens_BT, whole_rows(torch.tensor([4, 3])), 1, torch.device("cpu"), wanted_BT=wanted_BT, keep=keep)
    everything = pack(tokens_BT, whole_rows(torch.tensor([4, 3])), 1, torch.device("cpu"), wanted_BT=wanted_BT)
    hidden_T = torch.arange(7.0) + 10
    assert packed.kept_K is not None and everything.kept_K is None
    assert packed.kept_K.tolist() == ([2, 5] if keep is Keep.PREDICTIONS else [3, 6])
    hidden_K = hidden_T[packed.kept_K]
    if keep is Keep.PREDICTIONS:
        rows_BT = packed.to_rows(hidden_K[packed.source_N])
        assert rows_BT.tolist() == [[0, 0, 0, 12], [0, 0, 15, 0]]
        assert torch.equal(rows_BT, everything.to_rows(hidden_T[everything.source_N]))
    else:
        assert packed.at_ends(hidden_K).tolist() == [13, 16] == everything.at_ends(hidden_T).tolist()


def test_where_nothing_is_wanted_one_token_is_kept() -> None:
    blank_BT = torch.zeros(1, 2, dtype=torch.long)
    packed = pack(
        blank_BT,
        whole_rows(torch.tensor([2])),
        1,
        torch.device("cpu"),
        wanted_BT=blank_BT.bool(),
        keep=Keep.PREDICTIONS,
    )
    assert packed.kept_K is not None and packed.kept_K.tolist() == [0]
    assert packed.to_rows(torch.ones(1)[packed.source_N]).tolist() == [[0, 0]]
