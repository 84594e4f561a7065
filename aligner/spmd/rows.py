"""`BatchRows`: the rows of one batch, and how they are partitioned over data-parallel shards."""

from __future__ import annotations

from dataclasses import dataclass, field

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import Shares, partition


@dataclass
class BatchRows:
    """The rows of one batch: every value computed from it lines up by global row number.

    `known` is kept equal on all ranks (each sees every role call), so both ends of a transfer agree on who still
    needs the lengths.
    """

    group_size: int
    """Rows of one prompt."""
    known: set[int]
    """World ranks that hold `lengths`."""
    lengths: list[int] | None = None
    """Tokens of each row, in global order; None on ranks that have not needed it."""
    _shares: dict[tuple[int, int, Cost], Shares] = field(default_factory=dict, repr=False)

    def shares(self, shards: int, minibatches: int = 1, cost: Cost = TOKENS) -> Shares:
        """The partition of these rows, computed once; needs the lengths."""
        key = (shards, minibatches, cost)
        if key not in self._shares:
            assert self.lengths is not None, "a rank that has not learned the lengths asks for the partition"
            self._shares[key] = partition(self.lengths, shards, self.group_size, minibatches, cost)
        return self._shares[key]
