"""Sequence packing: microbatches by a token budget, and the flat layout of one packed microbatch.

Here T counts the tokens of all rows of the microbatch, concatenated; with context parallelism those that this rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import balance, of_groups
from aligner.trainer.context import split_rows, tokens_per_rank


def microbatches(lengths: Sequence[int], budget: int, together: int = 1) -> list[list[int]]:
    """Row indices of each microbatch: at most `budget` tokens each, in few microbatches, rows of similar length together.

    First fit decreasing (Johnson 1974): at most 11/9 of the minimum, plus one. A row (or group) longer than the budget
    becomes a microbatch of its own.

    Args:
        together: groups of this many consecutive rows are never split.
    """
    assert len(lengths) % together == 0, f"{len(lengths)} rows are not complete groups of {together}"
    tokens = of_groups(lengths, together, TOKENS)
    groups_of: list[list[int]] = []
    free: list[int] = []
    for group in sorted(range(len(tokens)), key=lambda group: (-tokens[group], group)):
        index = next((i for i, tokens_left in enumerate(free) if tokens_left >= tokens[group]), len(free))
        if index == len(free):
            groups_of.append([])
            free.append(budget)
        groups_of[index].append(group)
        free[index] -= tokens[group]
    return [_rows(groups, together) for groups in groups_of]


def even_microbatches(
    lengths: Sequence[int], budget: int, together: int, count: int, cost: Cost = TOKENS
) -> list[list[int]]:
    """Exactly `count` microbatches of nearly equal cost, most expensive first, for ranks that wait for each other's
    microbatches. If there are fewer groups, the last ones are empty.

    Args:
        count: at least the number that `microbatches` returns.
    """
    tokens, costs = of_groups(lengths, together, TOKENS), of_groups(lengths, together, cost)
    batches = balance(costs, count, tokens)
    if any(len(groups) > 1 and sum(tokens[group] for group in groups) > budget for groups in batches):
        batches = [[row // together for row in rows[::together]] for rows in microbatches(lengths, budget, together)]
        while len(batches) < count:  # split the most expensive one: both halves keep within the budget
            batches.sort(key=lambda groups: sum(costs[group] for group in groups) if len(groups) > 1 else -1)
            groups = batches.pop()
            batches += [[groups[index] for index in half] for half in balance([costs[group] for group in groups], 2)]
    batches.sort(key=lambda groups: -sum(costs[group] for group in groups))
    return [_rows(sorted(groups, key=lambda group: (-tokens[group], group)), together) for groups in batches]


def _rows(groups: Sequence[int], together: int) -> list[int]:
    return [row for group in groups for row in range(group * together, (group + 1) * together)]


@dataclass(frozen=True)
class Packed:
    """One microbatch as the model gets it on one context-parallel rank."""

    tokens_T: Tensor
    """int64: the rows' tokens, then zeros up to a multiple of `multiple_of`; the same number on every context-parallel rank."""
    positions_T: Tensor
    """int64: position of each token in its row."""
    targets_T: Tensor
    """int64: the next token of the row; 0 at a row's last token."""
    lengths: Tensor
    """int32, CPU: tokens of each row (padding counts as one more row); with context parallelism, of each complete row."""
    source_N: Tensor
    """Indices in [T] of tokens whose prediction is used: all but each row's last."""
    target_N: Tensor
    """Index of each predicted token in a flattened [B, width] array."""
    last_N: Tensor
    """Indices in [T] of rows' last tokens."""
    row_N: Tensor
    """The rows of `last_N`: all but those that end on another context-parallel rank."""
    rows: int
    """B."""
    width: int
    """Tokens of the longest row."""

    def to_rows(self, value_T: Tensor) -> Tensor:
        """Per-prediction values [T] -> [B, width], at the predicted tokens; 0 elsewhere, also at tokens of other
        context-parallel ranks. Differentiable."""
        flat = value_T.new_zeros(self.rows * self.width)
        return flat.index_copy(0, self.target_N, value_T[self.source_N]).view(self.rows, self.width)

    def at_ends(self, value_T: Tensor) -> Tensor:
        """Values [T] -> [B], at each row's last token; 0 if another context-parallel rank holds it. Differentiable."""
        return value_T.new_zeros(self.rows).index_copy(0, self.row_N, value_T[self.last_N])


def pack(
    tokens_BT: Tensor,
    length_B: Tensor,
    multiple_of: int,
    device: torch.device,
    context: int = 1,
    context_rank: int = 0,
) -> Packed:
    """Right-padded rows -> one packed microbatch, for one context-parallel rank.

    Args:
        tokens_BT: int64, on the host.
        length_B: number of tokens of each row.
        multiple_of: pad T to a multiple of it (sequence parallelism needs a multiple of the tensor-parallel size).
        context: number of ranks that the rows are split over.
    """
    rows, width = tokens_BT.shape
    lengths = length_B.to(torch.int32)
    row_S = torch.repeat_interleave(torch.arange(rows), length_B)
    position_S = torch.cat([torch.arange(length) for length in length_B.tolist()])
    local_T = torch.arange(len(row_S))
    if context > 1:
        local_T = split_rows(tuple(lengths.tolist()), context).token_indices(context_rank)
    row_T, positions_T = row_S[local_T], position_S[local_T]
    is_last_T = positions_T == length_B[row_T] - 1
    tokens_T = tokens_BT[row_T, positions_T]
    targets_T = tokens_BT[row_T, (positions_T + 1).clamp(max=width - 1)].masked_fill(is_last_T, 0)
    source_N, last_N = torch.nonzero(~is_last_T)[:, 0], torch.nonzero(is_last_T)[:, 0]
    target_N = (row_T * width + positions_T + 1)[source_N]
    missing = tokens_per_rank(length_B.tolist(), context, multiple_of) - len(local_T)
    if missing:
        tokens_T, targets_T = (torch.cat([x, x.new_zeros(missing)]) for x in (tokens_T, targets_T))
        positions_T = torch.cat([positions_T, torch.arange(missing)])
        if context == 1:
            lengths = torch.cat([lengths, torch.tensor([missing], dtype=torch.int32)])
    tensors = (tokens_T, positions_T, targets_T, source_N, target_N, last_N, row_T[last_N])
    tokens_T, positions_T, targets_T, source_N, target_N, last_N, row_N = (
        x.to(device, non_blocking=True) for x in tensors
    )
    return Packed(tokens_T, positions_T, targets_T, lengths, source_N, target_N, last_N, row_N, rows, width)
