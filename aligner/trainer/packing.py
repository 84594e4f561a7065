"""Sequence packing: microbatches by a token budget, and the flat layout of one packed microbatch.

T here counts the tokens of all segments of the microbatch, one segment after the other; with context parallelism those that
this rank holds. A segment is a row, or what several rows share (see `prefix_tree`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import deal
from aligner.trainer.context import split_rows, tokens_per_rank
from aligner.trainer.prefix_tree import PrefixTree, Segment, whole_rows


@dataclass(frozen=True)
class Unit:
    """Rows that no microbatch splits."""

    rows: tuple[int, ...]
    """Ascending within each group of rows that belong together."""
    tokens: int
    """What they are in a microbatch, at most; others may share tokens with them."""
    cost: int


def units(tree: PrefixTree, budget: int, together: int = 1, cost: Cost = TOKENS) -> list[Unit]:
    """Rows that share a beginning, as many as the budget allows in one unit; every other row is one of its own.

    Args:
        budget: tokens of one microbatch: where rows that share a beginning are more, each part of them computes it.
        together: groups of this many consecutive rows are never split.
    """
    rows = len(tree.length_B)
    assert rows % together == 0, f"{rows} rows are not whole groups of {together}"
    groups = [tuple(range(first, first + together)) for first in range(0, rows, together)]
    made: list[list[int]] = []
    for family in _families(tree, groups):
        unit: list[int] = []
        nodes: set[int] = set()
        tokens = 0
        for group in sorted(family, key=lambda group: min(tree.order_B[row] for row in groups[group])):
            more = {node for row in groups[group] for node in tree.path(row)}
            own = sum(tree.length_B[row] - tree.own_start(row) for row in groups[group])
            if unit and tokens + own + tree.node_tokens(more - nodes) > budget:
                made.append(unit)
                unit, nodes, tokens = [], set(), 0
            tokens += own + tree.node_tokens(more - nodes)
            nodes |= more
            unit += groups[group]
        made.append(unit)
    return [Unit(tuple(unit), tree.tokens(unit), tree.cost(unit, cost)) for unit in sorted(made)]


def _families(tree: PrefixTree, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of the groups that are linked by rows that begin in the same node."""
    joined = list(range(len(groups)))  # a number on the way to the family's lowest

    def lowest(number: int) -> int:
        while joined[number] != number:
            joined[number] = number = joined[joined[number]]
        return number

    first_in: dict[int, int] = {}
    for number, group in enumerate(groups):
        for root in {path[0] for row in group if (path := tree.path(row))}:
            a, b = sorted((lowest(first_in.setdefault(root, number)), lowest(number)))
            joined[b] = a
    families: dict[int, list[int]] = {}
    for number in range(len(groups)):
        families.setdefault(lowest(number), []).append(number)
    return list(families.values())


def microbatches(parts: Sequence[Unit], budget: int) -> list[list[int]]:
    """Rows of each microbatch: at most `budget` tokens each, in few microbatches, units of similar size together.

    Largest first into the first microbatch that has room (first fit decreasing, Johnson 1974: at most 11/9 of the fewest
    and one). What is larger than the budget gets a microbatch of its own.
    """
    return [_rows(batch) for batch in _first_fit(parts, budget)]


def _first_fit(parts: Sequence[Unit], budget: int) -> list[list[Unit]]:
    batches: list[list[Unit]] = []
    room: list[int] = []
    for unit in sorted(parts, key=_largest_first):
        place = next((number for number, left in enumerate(room) if left >= unit.tokens), len(room))
        if place == len(room):
            batches.append([])
            room.append(budget)
        batches[place].append(unit)
        room[place] -= unit.tokens
    return batches


def even_microbatches(parts: Sequence[Unit], budget: int, count: int) -> list[list[int]]:
    """Exactly `count` microbatches of nearly equal cost, dearest first, for ranks that wait for each other's; those at the
    end are empty where there are fewer units.

    Args:
        count: as many as `microbatches` finds, or more.
    """
    dealt = deal([unit.cost for unit in parts], count, [unit.tokens for unit in parts])
    batches = [[parts[number] for number in share] for share in dealt]
    if any(len(batch) > 1 and sum(unit.tokens for unit in batch) > budget for batch in batches):
        batches = _first_fit(parts, budget)
        while len(batches) < count:  # halve the dearest: that keeps within the budget
            batches.sort(key=lambda batch: _cost(batch) if len(batch) > 1 else -1)
            batch = batches.pop()
            batches += [[batch[at] for at in half] for half in deal([unit.cost for unit in batch], 2)]
    batches.sort(key=lambda batch: -_cost(batch))
    return [_rows(sorted(batch, key=_largest_first)) for batch in batches]


def _largest_first(unit: Unit) -> tuple[int, tuple[int, ...]]:
    return -unit.tokens, unit.rows


def _cost(batch: Sequence[Unit]) -> int:
    return sum(unit.cost for unit in batch)


def _rows(batch: Sequence[Unit]) -> list[int]:
    return [row for unit in batch for row in unit.rows]


@dataclass(frozen=True)
class Packed:
    """One microbatch as the model sees it on one context rank."""

    tokens_T: Tensor
    """int64: the segments' tokens, then zeros up to a multiple of `multiple_of`; as many on every context rank."""
    positions_T: Tensor
    """int64: position of each token in its rows."""
    targets_T: Tensor
    """int64: the next token of its rows; 0 at a row's last token."""
    segments_S2: Tensor
    """int32, CPU: (tokens, number of the parent or -1) of each segment (the padding counts as one more without a parent);
    over context ranks of each whole segment."""
    source_N: Tensor
    """Flat positions whose prediction is wanted: every token but each row's last, once for each of its rows."""
    target_N: Tensor
    """Where it belongs in a flattened [B, width] array: the predicted token's own place."""
    last_N: Tensor
    """Flat positions of rows' last tokens."""
    row_N: Tensor
    """Whose last tokens they are: all rows but those that end on another context rank."""
    rows: int
    width: int

    def to_rows(self, value_T: Tensor) -> Tensor:
        """Per-prediction values [T] -> [B, width] at the predicted token, of each row that shares it; 0 elsewhere, as for
        tokens that another context rank holds. Differentiable."""
        flat = value_T.new_zeros(self.rows * self.width)
        return flat.index_copy(0, self.target_N, value_T[self.source_N]).view(self.rows, self.width)

    def at_ends(self, value_T: Tensor) -> Tensor:
        """Values [T] -> [B] at each row's last token; 0 where another context rank holds it. Differentiable."""
        return value_T.new_zeros(self.rows).index_copy(0, self.row_N, value_T[self.last_N])


def pack(
    tokens_BT: Tensor,
    length_B: Tensor,
    multiple_of: int,
    device: torch.device,
    context: int = 1,
    context_rank: int = 0,
    segments: Sequence[Segment] = (),
) -> Packed:
    """Right-padded rows -> one packed microbatch, as one context rank has it.

    Args:
        tokens_BT: int64 rows.
        length_B: tokens of each row.
        multiple_of: pad the total to it (sequence parallelism needs a multiple of the tensor size).
        context: ranks that the segments are cut over.
        segments: what rows share, and the rest of each; none: each row is a segment.
    """
    rows, width = tokens_BT.shape
    segments = segments or whole_rows(length_B.tolist()).segments(range(rows))
    segments_S2 = torch.tensor([(one.stop - one.start, one.parent) for one in segments], dtype=torch.int32)
    length_S, sharers_S = segments_S2[:, 0], torch.tensor([len(one.rows) for one in segments])
    number_S = torch.repeat_interleave(torch.arange(len(segments)), length_S)
    position_S = torch.cat([torch.arange(one.start, one.stop) for one in segments])
    mine_T = torch.arange(len(number_S))
    if context > 1:
        mine_T = split_rows(tuple(length_S.tolist()), context).token_indices(context_rank)
    number_T, positions_T = number_S[mine_T], position_S[mine_T]
    row_T = torch.tensor([one.rows[0] for one in segments])[number_T]
    is_last_T = positions_T == length_B[row_T] - 1
    tokens_T = tokens_BT[row_T, positions_T]
    targets_T = tokens_BT[row_T, (positions_T + 1).clamp(max=width - 1)].masked_fill(is_last_T, 0)
    predicts_T, last_N = torch.nonzero(~is_last_T)[:, 0], torch.nonzero(is_last_T)[:, 0]
    source_N = torch.repeat_interleave(predicts_T, sharers_S[number_T[predicts_T]])
    target_N = _row_of_each(segments, number_T[predicts_T]) * width + positions_T[source_N] + 1
    missing = tokens_per_rank(length_S.tolist(), context, multiple_of) - len(mine_T)
    if missing:
        tokens_T, targets_T = (torch.cat([x, x.new_zeros(missing)]) for x in (tokens_T, targets_T))
        positions_T = torch.cat([positions_T, torch.arange(missing)])
        if context == 1:
            segments_S2 = torch.cat([segments_S2, torch.tensor([[missing, -1]], dtype=torch.int32)])
    held = (tokens_T, positions_T, targets_T, source_N, target_N, last_N, row_T[last_N])
    on = [x.to(device, non_blocking=True) for x in held]
    return Packed(on[0], on[1], on[2], segments_S2, on[3], on[4], on[5], on[6], rows, width)


def _row_of_each(segments: Sequence[Segment], number_N: Tensor) -> Tensor:
    """Tokens' segments -> the rows of each token, one token's after the other's."""
    count_S = torch.tensor([len(one.rows) for one in segments])
    rows = torch.tensor([row for one in segments for row in one.rows])
    first_N = (torch.cumsum(count_S, 0) - count_S)[number_N]
    count_N = count_S[number_N]
    base_N = torch.cumsum(count_N, 0) - count_N
    return rows[torch.arange(int(count_N.sum())) + torch.repeat_interleave(first_N - base_N, count_N)]
