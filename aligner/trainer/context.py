"""Context parallelism: how the rows of a microbatch are split over ranks (pure arithmetic, the same on every rank).

Causal attention makes late tokens more expensive than early ones, so a rank holds two spans of each row, at equal distances
from its beginning and its end (zig-zag: rank r of C has chunks r and 2C-1-r).
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
    """Which rank holds which tokens of one microbatch."""

    spans: tuple[tuple[TokenSpan, ...], ...]
    """The spans of each rank, in the order in which it holds them; none is empty."""
    starts: tuple[int, ...]
    """Index of each row's first token among the tokens of all rows, concatenated."""

    def token_indices(self, rank: int) -> Tensor:
        """int64 [tokens(rank)]: indices, among the tokens of all rows concatenated, of those that a rank holds, in its order."""
        indices = [torch.arange(span.start, span.stop) + self.starts[span.row] for span in self.spans[rank]]
        return torch.cat(indices) if indices else torch.zeros(0, dtype=torch.long)

    def tokens(self, rank: int) -> int:
        """Number of tokens that a rank holds."""
        return sum(span.stop - span.start for span in self.spans[rank])


@lru_cache(maxsize=64)
def split_rows(lengths: tuple[int, ...], ranks: int) -> ContextSplit:
    """Split every row over `ranks` ranks without padding: the ranks' totals differ by at most one token.

    A rank's share of a row is 1 / ranks of it, rounded up on the ranks that have the fewest tokens so far; half of the
    share is taken from the row's beginning in the order of the ranks, the rest from its end in the opposite order.
    """
    spans: list[list[TokenSpan]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for row, length in enumerate(lengths):
        quotient, remainder = divmod(length, ranks)
        favoured = sorted(range(ranks), key=lambda rank: (totals[rank], rank))[:remainder]
        begin, end = 0, length
        for rank in range(ranks):
            share = quotient + (rank in favoured)
            totals[rank] += share
            head, tail = (begin, begin + share // 2), (end - (share - share // 2), end)
            begin, end = head[1], tail[0]
            # the last rank's two spans meet in the row's middle: one span
            for start, stop in [(head[0], tail[1])] if head[1] == tail[0] else [head, tail]:
                if stop > start:
                    spans[rank].append(TokenSpan(row, start, stop))
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return ContextSplit(tuple(map(tuple, spans)), tuple(starts[:-1]))


def tokens_per_rank(lengths: Sequence[int], ranks: int, multiple_of: int) -> int:
    """Tokens per rank, padded so that each rank has the same multiple of `multiple_of`; at least `multiple_of`."""
    multiple = multiple_of * ranks
    return max(1, -(-sum(lengths) // multiple)) * multiple_of
