"""What reading a row costs, as a function of its length: what rows are dealt to shards by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """A row of l tokens costs `linear` x l + `quadratic` x l^2; whole numbers, so that every rank adds up the same."""

    linear: int = 1
    """Of one token, whatever the row is like: FLOPs of the weights that it passes."""
    quadratic: int = 0
    """Of one token for each token of its row: FLOPs of attention."""

    def of(self, tokens: int) -> int:
        """Of a row of this many tokens."""
        return self.linear * tokens + self.quadratic * tokens * tokens


TOKENS = Cost()
"""Of roles without a model, such as rules: one unit a token."""
