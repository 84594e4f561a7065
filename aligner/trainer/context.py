"""Context parallelism: how the rows of a microbatch are split over ranks (pure arithmetic, the same on every rank).

Causal attention makes late tokens dearer than early ones, so a rank holds two spans of each row: one counted from its
beginning, and the one as far from its end (zig-zag; rank r of C has chunks r and 2C-1-r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of a row: positions start..stop-1."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class ContextSplit:
    """Who holds which tokens of one microbatch."""

    spans: tuple[tuple[TokenSpan, ...], ...]
    """Of each rank, in the order in which it holds them; none is empty."""
    starts: tuple[int, ...]
    """Of each row: its first token's place among the tokens of all rows."""

    def token_indices(self, rank: int) -> Tensor:
        """int64: which tokens of all rows, one row after the other, a rank holds, in its order."""
        indices = [torch.arange(p.start, p.stop) + self.starts[p.row] for p in self.spans[rank]]
        return torch.cat(indices) if indices else torch.zeros(0, dtype=torch.long)

    def tokens(self, rank: int) -> int:
        """How many it holds."""
        return sum(p.stop - p.start for p in self.spans[rank])


@lru_cache(maxsize=64)
def split_rows(lengths: tuple[int, ...], ranks: int) -> ContextSplit:
    """Split every row over `ranks` ranks, so that nothing is padded: the ranks' totals differ by one token at most.

    A rank's share of a row is 1 / ranks of it, rounded up on the ranks that have the fewest tokens so far; half of the
    share is taken from the row's beginning in the order of the ranks, the rest from its end in the opposite order.
    """
    spans: list[list[TokenSpan]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for row, length in enumerate(lengths):
        least, more = divmod(length, ranks)
        favoured = sorted(range(ranks), key=lambda rank: (held[rank], rank))[:more]
        begin, end = 0, length
        for rank in range(ranks):
            share = least + (rank in favoured)
            held[rank] += share
            head, tail = (begin, begin + share // 2), (end - (share - share // 2), end)
            begin, end = head[1], tail[0]
            # in the row's middle the last rank's two spans are one
            for start, stop in [(head[0], tail[1])] if head[1] == tail[0] else [head, tail]:
                if stop > start:
                    spans[rank].append(TokenSpan(row, start, stop))
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return ContextSplit(tuple(map(tuple, spans)), tuple(starts[:-1]))


def tokens_per_rank(lengths: Sequence[int], ranks: int, multiple_of: int) -> int:
    """Tokens that every rank has in the model, with the padding up to a multiple; at least one multiple."""
    whole = multiple_of * ranks
    return max(1, -(-sum(lengths) // whole)) * multiple_of
