"""Cuts by hand: which rows of which tensor each rank of an axis holds, and where."""

from __future__ import annotations

import pytest

from aligner.models.cuts import (
    Block,
    Columns,
    Cut,
    CutParameters,
    GroupedQKV,
    Parameter,
    Replicated,
    Rows,
    Vocabulary,
    tensor_shapes,
)


def held(cut: Cut, parts: int, index: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    return [(name, lo, size, offset) for name, lo, size, offset, _ in cut.regions(parts, index)]


def test_replicated_and_columns() -> None:
    assert held(Replicated(Block("norm", (6,))), 3, 2) == [("norm", (0,), (6,), 0)]
    down = Columns(Block("down", (4, 6)))
    assert held(down, 2, 1) == [("down", (0, 3), (4, 3), 0)]
    assert next(down.regions(2, 1)).stride == (3, 1)


def test_a_fused_gate_and_up_projection() -> None:
    """Of 4 rows each rank has 2 of the gate, and below them, after 2 rows of 3, the same 2 of the up projection."""
    cut = Rows((Block("gate", (4, 3)), Block("up", (4, 3))))
    assert held(cut, 2, 1) == [("gate", (2, 0), (2, 3), 0), ("up", (2, 0), (2, 3), 6)]


def test_one_tensor_that_fuses_several_projections() -> None:
    """A checkpoint's own fused tensor: the second block begins at its row 4."""
    cut = Rows((Block("gate_up", (4, 3)), Block("gate_up", (4, 3), start=4)))
    assert held(cut, 2, 1) == [("gate_up", (2, 0), (2, 3), 0), ("gate_up", (6, 0), (2, 3), 6)]
    assert tensor_shapes([Parameter("fc1", cut)]) == {"gate_up": (8, 3)}


def test_key_and_value_heads_are_copied_beyond_their_number() -> None:
    """4 query heads and 2 key/value heads of 2 rows on 4 ranks: ranks 2 and 3 share the second key/value head."""
    cut = Rows((Block("q", (8, 1)), Block("k", (4, 1)), Block("v", (4, 1))), (4, 2, 2))
    assert held(cut, 4, 3) == [("q", (6, 0), (2, 1), 0), ("k", (2, 0), (2, 1), 2), ("v", (2, 0), (2, 1), 4)]
    assert held(cut, 4, 2)[1:] == held(cut, 4, 3)[1:]
    shared = CutParameters([Parameter("qkv", cut)], 4)
    assert [ranks for _, ranks in shared.by_name["k"]] == [(0, 1), (2, 3)]
    assert [[one.region.name for one in part] for part in shared.of_part] == [["q", "k", "v"]] * 4


def test_megatron_interleaves_query_key_and_value_by_key_value_head() -> None:
    """2 key/value heads of 1 row with 2 query heads each: q0 q1 k0 v0 q2 q3 k1 v1, cut anywhere."""
    cut = GroupedQKV(Block("q", (4, 1)), Block("k", (2, 1)), Block("v", (2, 1)), 2)
    assert held(cut, 2, 1) == [("q", (2, 0), (2, 1), 0), ("k", (1, 0), (1, 1), 2), ("v", (1, 0), (1, 1), 3)]
    assert held(cut, 4, 1) == [("k", (0, 0), (1, 1), 0), ("v", (0, 0), (1, 1), 1)]


@pytest.mark.parametrize(("multiple", "parts", "padded"), [(1, 2, 6), (1, 4, 8), (4, 2, 8), (64, 2, 64)])
def test_a_vocabulary_of_five_is_rounded_up(multiple: int, parts: int, padded: int) -> None:
    cut = Vocabulary(Block("embedding", (5, 2)), multiple)
    assert cut.padded(parts) == padded
    rows = [sum(size[0] for _, _, size, _ in held(cut, parts, part)) for part in range(parts)]
    assert sum(rows) == 5 and rows[0] == min(5, padded // parts)


def test_parameters_of_experts_lie_behind_each_other() -> None:
    """Each rank's part of an expert: 1 row of 3 of the gate and of the up projection are 6 elements."""
    cut = CutParameters([Parameter("w13", Rows((Block("gate", (2, 3)), Block("up", (2, 3)))))], 2)
    assert {one.elements for one in cut.of_part[1]} == {6}
