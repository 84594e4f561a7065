"""Rows cut over context ranks: the arithmetic, and attention beside a dense mask."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from aligner.trainer.context import TokenSpan, split_rows, tokens_per_rank
from aligner.trainer.megatron.context_attention import BLOCK, AttentionPlan, Call, _bias
from aligner.trainer.packing import pack
from aligner.trainer.row_contexts import whole_rows
from tests import fork_server
from tests.conftest import Ranks

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=20)


def test_a_cut_by_hand() -> None:
    # 8 tokens over 2 ranks in 4 chunks of 2: rank 0 has the first and the last, rank 1 the two in the middle
    assert split_rows((8,), 2).spans == ((TokenSpan(0, 0, 2), TokenSpan(0, 6, 8)), (TokenSpan(0, 2, 6),))
    # an odd token goes to the rank with the fewest so far; a lone token to the end of its row
    assert split_rows((1, 1, 3), 2).spans == (
        (TokenSpan(0, 0, 1), TokenSpan(2, 0, 1), TokenSpan(2, 2, 3)),
        (TokenSpan(1, 0, 1), TokenSpan(2, 1, 2)),
    )
    assert split_rows((1, 1, 3), 2).token_indices(0).tolist() == [0, 2, 4]


@given(LENGTHS, st.integers(1, 5), st.integers(1, 4))
def test_every_token_has_one_rank_and_nothing_is_wasted(lengths: list[int], ranks: int, multiple_of: int) -> None:
    whole = split_rows(tuple(lengths), ranks)
    everything = torch.cat([whole.token_indices(rank) for rank in range(ranks)])
    assert sorted(everything.tolist()) == list(range(sum(lengths)))
    held = [whole.tokens(rank) for rank in range(ranks)]
    assert max(held) - min(held) <= 1
    padded = tokens_per_rank(lengths, ranks, multiple_of)
    assert padded >= max(held) and padded % multiple_of == 0
    assert padded * ranks - sum(lengths) < multiple_of * ranks


@given(st.lists(st.integers(2000, 9000), min_size=1, max_size=6), st.integers(2, 8))
def test_long_rows_are_the_same_work_for_every_rank(lengths: list[int], ranks: int) -> None:
    work = [
        sum((p.stop - p.start) * (p.start + p.stop + 1) / 2 for p in pieces) for pieces in split_rows(tuple(lengths), ranks).spans
    ]  # fmt: skip
    assert max(work) < 1.02 * min(work)


@given(LENGTHS, st.integers(1, 4), st.integers(2, 4))
def test_ranks_together_have_what_one_rank_has(lengths: list[int], multiple_of: int, ranks: int) -> None:
    tokens_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens_BT[row, :n] = torch.arange(1, n + 1) + 100 * row
    length_B, cpu = torch.tensor(lengths), torch.device("cpu")
    one = pack(tokens_BT, whole_rows(length_B), 1, cpu)
    parts = [pack(tokens_BT, whole_rows(length_B), multiple_of, cpu, ranks, rank) for rank in range(ranks)]
    assert len({part.tokens_T.numel() for part in parts}) == 1 and parts[0].tokens_T.numel() % multiple_of == 0
    assert all(part.segments_S2[:, 0].tolist() == lengths for part in parts)
    for name in ("tokens_T", "positions_T"):
        joined_BT = sum(part.to_rows(getattr(part, name)[part.source_N]) for part in parts)
        assert torch.equal(joined_BT, one.to_rows(getattr(one, name)[one.source_N])), name
    assert torch.equal(sum(part.to_rows(part.predicted_N) for part in parts), one.to_rows(one.predicted_N))
    assert torch.equal(sum(part.at_ends(part.tokens_T) for part in parts), one.at_ends(one.tokens_T))
    assert one.at_ends(one.tokens_T).tolist() == [n + 100 * row for row, n in enumerate(lengths)]


@given(st.integers(1, BLOCK), st.integers(0, 300))
def test_the_mask_of_a_cpu_is_the_one_that_cuda_knows_by_name(queries: int, earlier: int) -> None:
    call = Call(queries, queries + earlier, (((0, queries),),), (((0, queries + earlier),),))
    plan = AttentionPlan((call,), torch.empty(0), torch.empty(0), queries + earlier)
    bias = _bias(call, plan, torch.zeros(1))
    assert torch.equal(bias == 0, causal_lower_right(call.queries, call.keys)._materialize())
    assert bias.min() in (0, -torch.inf)


ROWS = [(9, 17, 12, 5), (1,), (3, 1), (2, 1, 3, 1, 2), (40, 40, 6, 6, 6), (600, 300), (521,)]
"""Ragged; fewer tokens than ranks; equal rows, which share a call; pieces longer than one block of queries."""


TREES = [
    ((20, 5, 7, 9, 9), (-1, -1, 0, 0, 0)),
    ((12, 9, 4, 1, 6, 6, 2, 11, 3), (-1, -1, 0, 0, 2, 2, 2, 1, 1)),
    ((300, 270, 280, 20), (-1, 0, 0, -1)),
]
"""(lengths, parents) of segments: branches of one beginning beside a row; a beginning of a beginning; more than one block of
queries, then a row."""


@pytest.mark.parametrize(("number", "lengths"), list(enumerate(ROWS)), ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_attention_beside_a_dense_mask(ranks: Ranks, size: int, number: int, lengths: tuple[int, ...]) -> None:
    ranks(size).run("tests.trainer.context_on_ranks:check_rows", lengths, 1 + number % 3)


@pytest.mark.parametrize(("number", "tree"), list(enumerate(TREES)), ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_attention_of_shared_segments(ranks: Ranks, size: int, number: int, tree: tuple[tuple[int, ...], ...]) -> None:
    lengths, parents = tree
    ranks(size).run("tests.trainer.context_on_ranks:check_rows", lengths, 1 + number % 3, parents)


@pytest.mark.parametrize("size", [2, 3])
def test_what_a_layer_keeps_for_its_backward(ranks: Ranks, size: int) -> None:
    ranks(size).run("tests.trainer.context_on_ranks:check_kept")


@pytest.mark.matrix
def test_activations_fall_with_the_ranks() -> None:
    """All key/value heads are there, so that keys and values of other ranks, were they kept, would show."""
    tool = ROOT / "tools" / "bench" / "context_memory.py"
    size = ["--tokens", "1024", "--layers", "2", "--kv-heads", "8", "--recompute", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = fork_server.run(
        [sys.executable, str(tool), *size], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (one["context"], two["context"]) == (1, 2)
    assert 1.85 < one["peak_mib"] / two["peak_mib"] < 2.05
