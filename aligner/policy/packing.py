"""Rows without padding: microbatches by a token budget, and the flat layout that one microbatch has in the model.

T here counts the tokens of all rows of the microbatch, one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import deal, of_groups


def microbatches(lengths: Sequence[int], budget: int, together: int = 1) -> list[list[int]]:
    """Row positions of each microbatch: at most `budget` tokens each, in few microbatches, rows of similar length together.

    Largest first into the first microbatch that has room (first fit decreasing, Johnson 1974: at most 11/9 of the fewest
    and one). What is longer than the budget gets a microbatch of its own.

    Args:
        together: groups of this many consecutive rows are never split.
    """
    assert len(lengths) % together == 0, f"{len(lengths)} rows are not whole groups of {together}"
    tokens = of_groups(lengths, together, TOKENS)
    found: list[list[int]] = []
    room: list[int] = []
    for group in sorted(range(len(tokens)), key=lambda group: (-tokens[group], group)):
        place = next((number for number, left in enumerate(room) if left >= tokens[group]), len(room))
        if place == len(room):
            found.append([])
            room.append(budget)
        found[place].append(group)
        room[place] -= tokens[group]
    return [_rows(groups, together) for groups in found]


def even_microbatches(
    lengths: Sequence[int], budget: int, together: int, count: int, cost: Cost = TOKENS
) -> list[list[int]]:
    """Exactly `count` microbatches of nearly equal cost, dearest first, for ranks that wait for each other's; those at the
    end are empty where there are fewer groups.

    Args:
        count: as many as `microbatches` finds, or more.
    """
    tokens, costs = of_groups(lengths, together, TOKENS), of_groups(lengths, together, cost)
    found = deal(costs, count, tokens)
    if any(len(groups) > 1 and sum(tokens[group] for group in groups) > budget for groups in found):
        found = [[row // together for row in rows[::together]] for rows in microbatches(lengths, budget, together)]
        while len(found) < count:  # halve the dearest: that keeps within the budget
            found.sort(key=lambda groups: sum(costs[group] for group in groups) if len(groups) > 1 else -1)
            groups = found.pop()
            found += [[groups[at] for at in half] for half in deal([costs[group] for group in groups], 2)]
    found.sort(key=lambda groups: -sum(costs[group] for group in groups))
    return [_rows(sorted(groups, key=lambda group: (-tokens[group], group)), together) for groups in found]


def _rows(groups: Sequence[int], together: int) -> list[int]:
    return [row for group in groups for row in range(group * together, (group + 1) * together)]


@dataclass(frozen=True)
class Packed:
    """One microbatch as the model sees it."""

    tokens_T: Tensor
    """int64: all rows' tokens, then zeros up to a multiple of `multiple_of`."""
    positions_T: Tensor
    """int64: position of each token in its row."""
    targets_T: Tensor
    """int64: the next token of the row; 0 at a row's last token."""
    lengths: Tensor
    """int32, CPU: tokens of each row (the padding counts as one more row)."""
    source_N: Tensor
    """Flat positions whose prediction is wanted: every token but each row's last."""
    target_N: Tensor
    """Where it belongs in a flattened [B, width] array: the predicted token's own place."""
    last_B: Tensor
    """Flat position of each row's last token."""
    rows: int
    width: int

    def to_rows(self, value_T: Tensor) -> Tensor:
        """Per-prediction values [T] -> [B, width] at the predicted token; 0 elsewhere. Differentiable."""
        flat = value_T.new_zeros(self.rows * self.width)
        return flat.index_copy(0, self.target_N, value_T[self.source_N]).view(self.rows, self.width)


def pack(tokens_BT: Tensor, length_B: Tensor, multiple_of: int, device: torch.device) -> Packed:
    """Right-padded rows -> one packed microbatch.

    Args:
        tokens_BT: int64 rows.
        length_B: tokens of each row.
        multiple_of: pad the total to it (sequence parallelism needs a multiple of the tensor size).
    """
    rows, width = tokens_BT.shape
    place_BT = torch.arange(width).expand(rows, width)
    inside_BT = place_BT < length_B[:, None]
    tokens_T, positions_T = tokens_BT[inside_BT], place_BT[inside_BT]
    lengths = length_B.to(torch.int32)
    source_N = torch.nonzero(positions_T < (torch.repeat_interleave(length_B, length_B) - 1))[:, 0]
    predicted_BT = inside_BT & (place_BT > 0)
    missing = -int(tokens_T.numel()) % multiple_of
    if missing:
        tokens_T = torch.cat([tokens_T, tokens_T.new_zeros(missing)])
        positions_T = torch.cat([positions_T, torch.arange(missing)])
        lengths = torch.cat([lengths, torch.tensor([missing], dtype=torch.int32)])
    targets_T = torch.cat([tokens_T[1:], tokens_T.new_zeros(1)])
    last = torch.cumsum(lengths.long(), 0) - 1
    targets_T[last] = 0
    target_N = torch.nonzero(predicted_BT.flatten())[:, 0]
    on = [t.to(device, non_blocking=True) for t in (tokens_T, positions_T, targets_T, source_N, target_N, last[:rows])]
    return Packed(on[0], on[1], on[2], lengths, on[3], on[4], on[5], rows, width)
