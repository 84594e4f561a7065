"""The contexts of a batch's rows: stretches of tokens that a model computes by themselves, positions from 0.

A row is one context, unless it is an episode of several segments (`Samples.segment_BT`): then each segment is one. What packs,
shares prefixes and attends works on contexts; readouts and losses get rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.spmd.cost import Cost
from aligner.trainer.prefix_tree import PrefixTree, Segment, separate_rows


@dataclass(frozen=True)
class RowContexts:
    """Which tokens of which rows the contexts (C of them) are; in the order of the rows, a row's own in their order."""

    row_C: Tensor
    """int64: index of the row."""
    start_C: Tensor
    """int64: index of the context's first token in its row."""
    length_C: Tensor
    """int64: its number of tokens."""
    ends_row_C: Tensor
    """bool: it is the last of its row."""

    @cached_property
    def of_row(self) -> list[list[int]]:
        """The contexts of each row."""
        numbers: list[list[int]] = []
        for context, row in enumerate(self.row_C.tolist()):
            numbers += [[] for _ in range(row + 1 - len(numbers))]
            numbers[row].append(context)
        return numbers

    def of_rows(self, rows: Sequence[int]) -> list[int]:
        """The contexts of these rows, row by row."""
        return [context for row in rows for context in self.of_row[row]]

    def take(self, rows: Sequence[int]) -> RowContexts:
        """Those of `rows`, which become rows 0, 1, ..."""
        contexts = torch.tensor(self.of_rows(rows), dtype=torch.long)
        counts = torch.tensor([len(self.of_row[row]) for row in rows])
        row_C = torch.repeat_interleave(torch.arange(len(rows)), counts)
        return RowContexts(row_C, self.start_C[contexts], self.length_C[contexts], self.ends_row_C[contexts])

    def tokens(self, tokens_BT: Tensor) -> Tensor:
        """[C, T] int64: the tokens of each context, right-padded."""
        if len(self.row_C) == len(tokens_BT) and not self.start_C.any():
            return tokens_BT
        place_T = torch.arange(int(self.length_C.max()))
        index_CT = (self.start_C[:, None] + place_T).clamp(max=tokens_BT.shape[1] - 1)
        return torch.where(place_T < self.length_C[:, None], tokens_BT[self.row_C[:, None], index_CT], 0)


@dataclass(frozen=True)
class ContextTree:
    """The contexts of a batch's rows, and the prefixes that these have in common."""

    contexts: RowContexts
    prefixes: PrefixTree
    """Of the contexts, which are its rows."""

    def tokens(self, rows: Sequence[int]) -> int:
        """Number of tokens to compute for a microbatch of these rows."""
        return self.prefixes.tokens(self.contexts.of_rows(rows))

    def cost(self, rows: Sequence[int], cost: Cost) -> int:
        """Cost of a microbatch of these rows."""
        return self.prefixes.cost(self.contexts.of_rows(rows), cost)

    def segments(self, rows: Sequence[int]) -> list[Segment]:
        """What a microbatch of these rows computes: see `PrefixTree.segments`."""
        return self.prefixes.segments(self.contexts.of_rows(rows))


def separate(contexts: RowContexts) -> ContextTree:
    """Contexts that share no prefixes."""
    return ContextTree(contexts, separate_rows(contexts.length_C.tolist()))


def whole_rows(length_B: Tensor) -> RowContexts:
    """Each row is one context."""
    rows = len(length_B)
    return RowContexts(torch.arange(rows), torch.zeros_like(length_B), length_B, torch.ones(rows, dtype=torch.bool))


def contexts_of(samples: Samples, ends_only: bool = False) -> RowContexts:
    """A batch's contexts: its segments.

    Args:
        ends_only: of each row only the last, where nothing but rows' ends is read.
    """
    if samples.segment_BT is None or not samples.rows:
        return whole_rows(samples.length_B)
    rows: list[int] = []
    starts: list[int] = []
    stops: list[int] = []
    for row, length in enumerate(samples.length_B.tolist()):
        step_T = samples.segment_BT[row, :length].diff()
        assert ((step_T == 0) | (step_T == 1)).all(), f"the segments of row {row} do not ascend one by one"
        begins = [0, *(torch.nonzero(step_T)[:, 0] + 1).tolist()]
        if ends_only:
            begins = begins[-1:]
        rows += [row] * len(begins)
        starts += begins
        stops += [*begins[1:], length]
    row_C, start_C = torch.tensor(rows), torch.tensor(starts)
    ends_row_C = torch.tensor([*(a != b for a, b in pairwise(rows)), True])
    return RowContexts(row_C, start_C, torch.tensor(stops) - start_C, ends_row_C)
