"""Common prefixes of rows and the microbatches that share them: by hand, and beside rows computed by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aligner.data.samples import pad_rows
from aligner.spmd.cost import Cost
from aligner.trainer.packing import microbatches, pack, row_units
from aligner.trainer.prefix_tree import PrefixTree, Segment, find_prefixes, separate_rows
from aligner.trainer.row_contexts import ContextTree, whole_rows

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)
"""Of so few tokens that prefixes of prefixes, equal rows and rows inside others are common."""
CPU = torch.device("cpu")


def tensors(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    return pad_rows(rows, torch.long), torch.tensor([len(row) for row in rows])


def tree_of(rows: list[list[int]], min_tokens: int = 1) -> PrefixTree:
    return find_prefixes(*tensors(rows), min_tokens)


def test_a_tree_by_hand() -> None:
    prompt, other = [1, 2, 3, 4], [9, 8, 7]
    rows = [[*prompt, 5], [*other, 1], [*prompt, 5, 6], prompt, [*other, 2, 2], [6]]
    # of the 4 tokens of the prompt 3 are shared, by rows 0, 2 and 3, and the fourth by rows 0 and 2; of the others' 3, 2
    tree = tree_of(rows)
    assert tree.segments(range(6)) == [
        Segment(-1, 0, 3, (0, 2, 3)),
        Segment(-1, 0, 2, (1, 4)),
        Segment(-1, 0, 1, (5,)),
        Segment(0, 3, 4, (0, 2)),
        Segment(1, 2, 4, (1,)),
        Segment(0, 3, 4, (3,)),
        Segment(1, 2, 5, (4,)),
        Segment(3, 4, 5, (0,)),
        Segment(3, 4, 6, (2,)),
    ]
    assert tree.tokens(range(6)) == 3 + 2 + 1 + 1 + 2 + 1 + 3 + 1 + 2
    # of rows 3 and 0 alone the prompt's first three tokens are shared; row 4 by itself shares nothing
    assert tree.segments([3, 0]) == [Segment(-1, 0, 3, (0, 1)), Segment(0, 3, 4, (0,)), Segment(0, 3, 5, (1,))]
    assert tree.segments([4]) == [Segment(-1, 0, 5, (0,))] == separate_rows([1, 1, 1, 1, 5]).segments([4])
    # squares: the prefix of 2 tokens costs 4, what follows it in rows of 4 and 5 tokens 16 - 4 and 25 - 4
    assert tree.cost([1, 4], Cost(0, 1)) == 4 + 12 + 21


def test_short_prefixes_are_not_shared() -> None:
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 8]]
    assert [one for one in tree_of(rows, 3).segments(range(3)) if len(one.rows) > 1] == [Segment(-1, 0, 4, (0, 1))]
    assert not tree_of(rows, 5).parents


def test_equal_rows_share_all_but_their_last_token() -> None:
    assert tree_of([[4, 5, 6]] * 3).segments(range(3)) == [
        Segment(-1, 0, 2, (0, 1, 2)), *(Segment(0, 2, 3, (row,)) for row in range(3)),
    ]  # fmt: skip
    assert tree_of([[4], [4]]).segments(range(2)) == [Segment(-1, 0, 1, (0,)), Segment(-1, 0, 1, (1,))]


@given(ROWS, st.integers(1, 4), st.data())
def test_segments_are_the_rows(rows: list[list[int]], min_tokens: int, data: st.DataObject) -> None:
    tree = tree_of(rows, min_tokens)
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    segments = tree.segments(chosen)
    for index, row in enumerate(chosen):
        chain = [number for number, one in enumerate(segments) if index in one.rows]
        assert [segments[number].parent for number in chain] == [-1, *chain[:-1]]
        assert [segments[number].start for number in chain] == [0, *(segments[number].stop for number in chain[:-1])]
        assert segments[chain[-1]].stop == len(rows[row]) and segments[chain[-1]].rows == (index,)
        for number in chain:
            one = segments[number]
            shared = {tuple(rows[chosen[other]][one.start : one.stop]) for other in one.rows}
            assert len(shared) == 1 and one.stop > one.start
    assert tree.tokens(chosen) == sum(one.stop - one.start for one in segments)


@given(ROWS, st.integers(1, 4), st.integers(1, 3))
def test_a_shared_pack_has_the_predictions_of_separate_rows(
    rows: list[list[int]], multiple_of: int, context: int
) -> None:
    tokens_BT, length_B = tensors(rows)
    segments = tree_of(rows).segments(range(len(rows)))
    separate = pack(tokens_BT, whole_rows(length_B), 1, CPU)
    contexts = whole_rows(length_B)
    parts = [pack(tokens_BT, contexts, multiple_of, CPU, context, rank, segments=segments) for rank in range(context)]
    for name in ("tokens_T", "positions_T"):
        added = sum(part.to_rows(getattr(part, name)[part.source_N]) for part in parts)
        assert torch.equal(added, separate.to_rows(getattr(separate, name)[separate.source_N])), name
    assert torch.equal(sum(part.to_rows(part.predicted_N) for part in parts), separate.to_rows(separate.predicted_N))
    ends = sum(part.at_ends(part.tokens_T) for part in parts)
    assert torch.equal(ends, separate.at_ends(separate.tokens_T))
    if context == 1:
        assert int(parts[0].segments_S2[:, 0].sum()) == parts[0].tokens_T.numel()


@given(ROWS.filter(lambda rows: len(rows) % 2 == 0), st.integers(4, 40), st.integers(1, 2))
def test_microbatches_of_shared_rows(rows: list[list[int]], budget: int, together: int) -> None:
    tree = tree_of(rows)
    units = row_units(ContextTree(whole_rows(tensors(rows)[1]), tree), budget, together)
    batches = microbatches(units, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        firsts = batch[::together]
        assert batch == [first + index for first in firsts for index in range(together)]
        assert tree.tokens(batch) <= budget or len(batch) == together
    assert sum(map(tree.tokens, batches)) <= sum(map(len, rows))


@pytest.mark.parametrize(("budget", "expected"), [(40, [[0, 2, 4, 1, 3, 5]]), (20, [[0, 2, 4], [1, 3, 5]])])
def test_rows_of_one_prompt_fill_a_microbatch(budget: int, expected: list[list[int]]) -> None:
    """Two prompts of 11 tokens, 10 of them shared; samples of 12: 16 tokens a prompt."""
    prompts = [[1] * 11, [2] * 11]
    rows = [[*prompts[row % 2], 3 + row] for row in range(6)]
    tree = tree_of(rows)
    batch = ContextTree(whole_rows(tensors(rows)[1]), tree)
    assert microbatches(row_units(batch, budget), budget) == expected
    # 14 tokens hold two samples of a prompt
    assert [len(unit.rows) for unit in row_units(batch, 14)] == [2, 2, 1, 1]
