"""Sequence packing: microbatches by a token budget, and the flat layout of one packed microbatch.

Here T counts the tokens of all segments of the microbatch, concatenated; with context parallelism those that this rank holds. A
segment is a context (a row, or one of an episode's: see `row_contexts`), a common prefix of several, or the rest of one (see
`prefix_tree`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import balance
from aligner.trainer.context import split_rows, tokens_per_rank
from aligner.trainer.prefix_tree import PrefixTree, Segment
from aligner.trainer.row_contexts import ContextTree, RowContexts, separate

MAX_KEPT = 0.95
"""Where more of the tokens than this are used, leaving out the rest is not worth the copies."""


class Keep(Enum):
    """Of which tokens a readout uses the final hidden states."""

    PREDICTIONS = "predictions"
    """Those that precede a token whose log-probability or value is wanted."""
    ENDS = "ends"
    """Rows' last tokens."""


@dataclass(frozen=True)
class Unit:
    """Rows that are never split over microbatches."""

    rows: tuple[int, ...]
    tokens: int
    """Tokens to compute for them in a microbatch, at most: other units may have a prefix in common with them."""
    cost: int


def row_units(batch: ContextTree, budget: int, together: int = 1, cost: Cost = TOKENS) -> list[Unit]:
    """One unit for rows with a common prefix, or several if they exceed the budget; one for every other row.

    Args:
        budget: maximum tokens of one microbatch.
        together: groups of this many consecutive rows are never split.
    """
    contexts, tree = batch.contexts, batch.prefixes
    rows = len(contexts.of_row)
    assert rows % together == 0, f"{rows} rows are not complete groups of {together}"
    groups = [range(first, first + together) for first in range(0, rows, together)]
    contexts_of_group = [contexts.of_rows(group) for group in groups]
    units: list[list[int]] = []
    for family in _families(tree, contexts_of_group):
        unit: list[int] = []
        nodes: set[int] = set()
        tokens = 0
        for group in sorted(family, key=lambda group: min(tree.order_B[one] for one in contexts_of_group[group])):
            group_nodes = {node for one in contexts_of_group[group] for node in tree.path(one)}
            own = sum(tree.length_B[one] - tree.own_start(one) for one in contexts_of_group[group])
            if unit and tokens + own + tree.node_tokens(group_nodes - nodes) > budget:
                units.append(unit)
                unit, nodes, tokens = [], set(), 0
            tokens += own + tree.node_tokens(group_nodes - nodes)
            nodes |= group_nodes
            unit += groups[group]
        units.append(unit)
    return [Unit(tuple(unit), batch.tokens(unit), batch.cost(unit, cost)) for unit in sorted(units)]


def _families(tree: PrefixTree, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the groups of contexts connected by common prefixes (union-find)."""
    towards_first = list(range(len(groups)))

    def first_of(index: int) -> int:
        while towards_first[index] != index:
            towards_first[index] = index = towards_first[towards_first[index]]
        return index

    first_in: dict[int, int] = {}
    for index, group in enumerate(groups):
        for root in {path[0] for one in group if (path := tree.path(one))}:
            first, second = sorted((first_of(first_in.setdefault(root, index)), first_of(index)))
            towards_first[second] = first
    families: dict[int, list[int]] = {}
    for index in range(len(groups)):
        families.setdefault(first_of(index), []).append(index)
    return list(families.values())


def microbatches(units: Sequence[Unit], budget: int) -> list[list[int]]:
    """Row indices of each microbatch: at most `budget` tokens each, in few microbatches, units of similar size together.

    First fit decreasing (Johnson 1974): at most 11/9 of the minimum, plus one. A unit larger than the budget becomes a
    microbatch of its own.
    """
    return [_rows(batch) for batch in _first_fit(units, budget)]


def _first_fit(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    batches: list[list[Unit]] = []
    free: list[int] = []
    for unit in sorted(units, key=_largest_first):
        index = next((i for i, tokens_left in enumerate(free) if tokens_left >= unit.tokens), len(free))
        if index == len(free):
            batches.append([])
            free.append(budget)
        batches[index].append(unit)
        free[index] -= unit.tokens
    return batches


def even_microbatches(units: Sequence[Unit], budget: int, count: int) -> list[list[int]]:
    """Exactly `count` microbatches of nearly equal cost, most expensive first, for ranks that wait for each other's
    microbatches. If there are fewer units, the last ones are empty.

    Args:
        count: at least the number that `microbatches` returns.
    """
    shares = balance([unit.cost for unit in units], count, [unit.tokens for unit in units])
    batches = [[units[index] for index in share] for share in shares]
    if any(len(batch) > 1 and sum(unit.tokens for unit in batch) > budget for batch in batches):
        batches = _first_fit(units, budget)
        while len(batches) < count:  # split the most expensive one: both halves keep within the budget
            batches.sort(key=lambda batch: _cost(batch) if len(batch) > 1 else -1)
            batch = batches.pop()
            batches += [[batch[index] for index in half] for half in balance([unit.cost for unit in batch], 2)]
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
    """One microbatch as the model gets it on one context-parallel rank."""

    tokens_T: Tensor
    """int64: the segments' tokens, then zeros up to a multiple of `multiple_of`; the same number on every context-parallel rank."""
    positions_T: Tensor
    """int64: position of each token in its contexts."""
    segments_S2: Tensor
    """int32, CPU: (number of tokens, index of the parent or -1) of each segment; padding counts as one more segment. With context
    parallelism, of each complete segment."""
    kept_K: Tensor | None
    """Indices in [T], ascending, of the tokens whose final hidden states the readout uses: the last layer need compute no others
    after its attention. None: all T are computed (K = T)."""
    source_N: Tensor
    """Indices in [K] of tokens whose prediction is used; a shared token's once for each of its rows."""
    target_N: Tensor
    """Index of each predicted token in a flattened [B, width] array."""
    predicted_N: Tensor
    """int64: the predicted tokens."""
    last_N: Tensor
    """Indices in [K] of rows' last tokens."""
    row_N: Tensor
    """The rows of `last_N`: all but those that end on another context-parallel rank."""
    rows: int
    """B."""
    width: int
    """Tokens of the longest row."""

    def to_rows(self, value_N: Tensor) -> Tensor:
        """Values of the used predictions [N] -> [B, width], at the predicted tokens of all rows; 0 elsewhere, also at tokens of other
        context-parallel ranks. Differentiable."""
        flat = value_N.new_zeros(self.rows * self.width)
        return flat.index_copy(0, self.target_N, value_N).view(self.rows, self.width)

    def at_ends(self, value_K: Tensor) -> Tensor:
        """Values [K] -> [B], at each row's last token; 0 if another context-parallel rank holds it. Differentiable."""
        return value_K.new_zeros(self.rows).index_copy(0, self.row_N, value_K[self.last_N])


def pack(
    tokens_BT: Tensor,
    contexts: RowContexts,
    multiple_of: int,
    device: torch.device,
    context: int = 1,
    context_rank: int = 0,
    wanted_BT: Tensor | None = None,
    segments: Sequence[Segment] = (),
    keep: Keep | None = None,
) -> Packed:
    """Right-padded rows -> one packed microbatch, for one context-parallel rank.

    Args:
        tokens_BT: int64, on the host.
        contexts: of these rows.
        multiple_of: pad T to a multiple of it (sequence parallelism needs a multiple of the tensor-parallel size).
        context: number of ranks that the segments are split over.
        wanted_BT: bool, the tokens whose prediction is used; None: every token. (A context's first token is predicted by none.)
        segments: common prefixes and the rest of each context; empty: each context is a segment.
        keep: what the readout uses, if the model's last layer can leave out the rest; the readout must use nothing else.
    """
    rows, width = tokens_BT.shape
    segments = segments or separate(contexts).segments(range(rows))
    segments_S2 = torch.tensor([(one.stop - one.start, one.parent) for one in segments], dtype=torch.int32)
    lengths, context_of = segments_S2[:, 0].tolist(), torch.tensor([one.rows[0] for one in segments])
    segment_of = torch.repeat_interleave(torch.arange(len(segments)), segments_S2[:, 0])
    position_of = torch.cat([torch.arange(one.start, one.stop) for one in segments])
    local_T = torch.arange(len(segment_of))
    if context > 1:
        local_T = split_rows(tuple(lengths), context).token_indices(context_rank)
    segment_T, positions_T = segment_of[local_T], position_of[local_T]
    context_T = context_of[segment_T]
    is_last_T = positions_T == contexts.length_C[context_T] - 1
    tokens_T = tokens_BT[contexts.row_C[context_T], contexts.start_C[context_T] + positions_T]
    last_N = torch.nonzero(is_last_T & contexts.ends_row_C[context_T])[:, 0]
    source_N, source_context_N = _each_context(segments, segment_T, torch.nonzero(~is_last_T)[:, 0])
    first_N = contexts.row_C[source_context_N] * width + contexts.start_C[source_context_N]
    target_N = first_N + positions_T[source_N] + 1
    if wanted_BT is not None:
        wanted_N = wanted_BT.flatten()[target_N]
        source_N, target_N = source_N[wanted_N], target_N[wanted_N]
    if keep is Keep.ENDS:
        source_N, target_N = source_N[:0], target_N[:0]
    elif keep is Keep.PREDICTIONS:
        last_N = last_N[:0]
    row_N = contexts.row_C[context_T[last_N]]
    kept_K = _kept_tokens(torch.cat([source_N, last_N]), len(local_T)) if keep is not None else None
    if kept_K is not None:
        source_N, last_N = torch.searchsorted(kept_K, source_N), torch.searchsorted(kept_K, last_N)
    missing = tokens_per_rank(lengths, context, multiple_of) - len(local_T)
    if missing:
        tokens_T = torch.cat([tokens_T, tokens_T.new_zeros(missing)])
        positions_T = torch.cat([positions_T, torch.arange(missing)])
        if context == 1:
            segments_S2 = torch.cat([segments_S2, torch.tensor([[missing, -1]], dtype=torch.int32)])
    tensors = (tokens_T, positions_T, source_N, target_N, tokens_BT.flatten()[target_N], last_N, row_N)
    tokens_T, positions_T, source_N, target_N, predicted_N, last_N, row_N = (
        x.to(device, non_blocking=True) for x in tensors
    )
    return Packed(
        tokens_T,
        positions_T,
        segments_S2,
        None if kept_K is None else kept_K.to(device, non_blocking=True),
        source_N,
        target_N,
        predicted_N,
        last_N,
        row_N,
        rows,
        width,
    )


def _kept_tokens(used_N: Tensor, tokens: int) -> Tensor | None:
    """Distinct indices of the tokens that are used, one at least, since modules need one; None: not worth leaving out the rest."""
    used_K = used_N.unique()
    if len(used_K) > MAX_KEPT * tokens:
        return None
    return used_K if len(used_K) else torch.zeros(1, dtype=torch.long)


def _each_context(segments: Sequence[Segment], segment_T: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Indices in [T] -> (indices, contexts): each index once for every context of its segment."""
    count = torch.tensor([len(one.rows) for one in segments])
    contexts = torch.tensor([context for one in segments for context in one.rows])
    segment_N = segment_T[index_N]
    count_N = count[segment_N]
    # offset from an entry's place here to that of its context in `contexts`
    offset_N = (torch.cumsum(count, 0) - count)[segment_N] - (torch.cumsum(count_N, 0) - count_N)
    place = torch.arange(int(count_N.sum()))
    return torch.repeat_interleave(index_N, count_N), contexts[place + torch.repeat_interleave(offset_N, count_N)]
