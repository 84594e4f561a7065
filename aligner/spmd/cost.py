"""Cost of a row as a function of its length, by which rows are balanced over data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """A row of l tokens costs `linear` x l + `quadratic` x l^2; whole numbers, so that every rank adds up the same."""

    linear: int = 1
    """Per token: FLOPs of the weights that a token passes through."""
    quadratic: int = 0
    """Per pair of tokens: FLOPs of attention."""

    def of(self, tokens: int) -> int:
        """Cost of a row of this many tokens."""
        return self.linear * tokens + self.quadratic * tokens * tokens


TOKENS = Cost()
"""For roles without a model, such as reward functions: one unit per token."""
