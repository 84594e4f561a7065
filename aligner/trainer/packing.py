"""Sequence packing: microbatches by a token budget, and the flat layout of one packed microbatch.

T here counts the tokens of all rows of the microbatch, one row after the other; with context parallelism those that this
rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import deal, of_groups
from aligner.trainer.context import split_rows, tokens_per_rank


def microbatches(lengths: Sequence[int], budget: int, together: int = 1) -> list[list[int]]:
    """Rows of each microbatch: at most `budget` tokens each, in few microbatches, rows of similar length together.

    Largest first into the first microbatch that has room (first fit decreasing, Johnson 1974: at most 11/9 of the fewest
    and one). What is longer than the budget gets a microbatch of its own.

    Args:
        together: groups of this many consecutive rows are never split.
    """
    assert len(lengths) % together == 0, f"{len(lengths)} rows are not whole groups of {together}"
    tokens = of_groups(lengths, together, TOKENS)
    groups_of: list[list[int]] = []
    room: list[int] = []
    for group in sorted(range(len(tokens)), key=lambda group: (-tokens[group], group)):
        place = next((number for number, left in enumerate(room) if left >= tokens[group]), len(room))
        if place == len(room):
            groups_of.append([])
            room.append(budget)
        groups_of[place].append(group)
        room[place] -= tokens[group]
    return [_rows(groups, together) for groups in groups_of]


def even_microbatches(
    lengths: Sequence[int], budget: int, together: int, count: int, cost: Cost = TOKENS
) -> list[list[int]]:
    """Exactly `count` microbatches of nearly equal cost, dearest first, for ranks that wait for each other's; those at the
    end are empty where there are fewer groups.

    Args:
        count: as many as `microbatches` finds, or more.
    """
    tokens, costs = of_groups(lengths, together, TOKENS), of_groups(lengths, together, cost)
    batches = deal(costs, count, tokens)
    if any(len(groups) > 1 and sum(tokens[group] for group in groups) > budget for groups in batches):
        batches = [[row // together for row in rows[::together]] for rows in microbatches(lengths, budget, together)]
        while len(batches) < count:  # halve the dearest: that keeps within the budget
            batches.sort(key=lambda groups: sum(costs[group] for group in groups) if len(groups) > 1 else -1)
            groups = batches.pop()
            batches += [[groups[at] for at in half] for half in deal([costs[group] for group in groups], 2)]
    batches.sort(key=lambda groups: -sum(costs[group] for group in groups))
    return [_rows(sorted(groups, key=lambda group: (-tokens[group], group)), together) for groups in batches]


def _rows(groups: Sequence[int], together: int) -> list[int]:
    return [row for group in groups for row in range(group * together, (group + 1) * together)]


@dataclass(frozen=True)
class Packed:
    """One microbatch as the model sees it on one context rank."""

    tokens_T: Tensor
    """int64: the rows' tokens, then zeros up to a multiple of `multiple_of`; as many on every context rank."""
    positions_T: Tensor
    """int64: position of each token in its row."""
    lengths: Tensor
    """int32, CPU: tokens of each row (the padding counts as one more row); over context ranks of each whole row."""
    source_N: Tensor
    """Flat positions whose prediction is wanted."""
    target_N: Tensor
    """Where it belongs in a flattened [B, width] array: the predicted token's own place."""
    predicted_N: Tensor
    """int64: that token."""
    last_N: Tensor
    """Flat positions of rows' last tokens."""
    row_N: Tensor
    """Whose last tokens they are: all rows but those that end on another context rank."""
    rows: int
    width: int

    def to_rows(self, value_N: Tensor) -> Tensor:
        """Values of the wanted predictions -> [B, width] at the predicted token; 0 elsewhere, as for tokens that another
        context rank holds. Differentiable."""
        flat = value_N.new_zeros(self.rows * self.width)
        return flat.index_copy(0, self.target_N, value_N).view(self.rows, self.width)

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
    wanted_BT: Tensor | None = None,
) -> Packed:
    """Right-padded rows -> one packed microbatch, as one context rank has it.

    Args:
        tokens_BT: int64 rows.
        length_B: tokens of each row.
        multiple_of: pad the total to it (sequence parallelism needs a multiple of the tensor size).
        context: ranks that the rows are cut over.
        wanted_BT: bool, the tokens whose prediction is wanted; None: every token. (A row's first is predicted by none.)
    """
    rows, width = tokens_BT.shape
    lengths = length_B.to(torch.int32)
    row_S = torch.repeat_interleave(torch.arange(rows), length_B)
    place_S = torch.cat([torch.arange(length) for length in length_B.tolist()])
    mine_T = torch.arange(len(row_S))
    if context > 1:
        mine_T = split_rows(tuple(lengths.tolist()), context).token_indices(context_rank)
    row_T, positions_T = row_S[mine_T], place_S[mine_T]
    is_last_T = positions_T == length_B[row_T] - 1
    tokens_T = tokens_BT[row_T, positions_T]
    source_N, last_N = torch.nonzero(~is_last_T)[:, 0], torch.nonzero(is_last_T)[:, 0]
    target_N = (row_T * width + positions_T + 1)[source_N]
    if wanted_BT is not None:
        wanted_N = wanted_BT.flatten()[target_N]
        source_N, target_N = source_N[wanted_N], target_N[wanted_N]
    missing = tokens_per_rank(length_B.tolist(), context, multiple_of) - len(mine_T)
    if missing:
        tokens_T = torch.cat([tokens_T, tokens_T.new_zeros(missing)])
        positions_T = torch.cat([positions_T, torch.arange(missing)])
        if context == 1:
            lengths = torch.cat([lengths, torch.tensor([missing], dtype=torch.int32)])
    held = (tokens_T, positions_T, source_N, target_N, tokens_BT.flatten()[target_N], last_N, row_T[last_N])
    on = [x.to(device, non_blocking=True) for x in held]
    return Packed(on[0], on[1], lengths, on[2], on[3], on[4], on[5], on[6], rows, width)
