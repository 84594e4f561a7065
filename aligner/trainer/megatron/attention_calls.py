"""Which rows share one call of a padded attention kernel: few calls, and little padding (pure arithmetic)."""

from __future__ import annotations

from functools import lru_cache

WASTE = 0.03
"""Tokens that pad shorter rows to the longest of their call, at most, as a share of the rows' own tokens."""


@lru_cache(maxsize=64)  # the attention and the accounts of a microbatch ask for the same
def shared_calls(lengths: tuple[int, ...]) -> list[list[int]]:
    """Rows of each attention call, longest first; all calls together pad by at most WASTE of the rows' tokens.

    Rows of neighbouring lengths share a call until its padding reaches an allowance, alike for all calls, so that rows
    of few tokens may differ by more; it is lowered until the sum is low enough.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    limit = int(WASTE * sum(lengths))
    allowance = limit
    while True:
        calls: list[list[int]] = []
        total = padding = 0
        for row in order:
            more = lengths[calls[-1][0]] - lengths[row] if calls else 0
            if not calls or padding + more > allowance:
                calls.append([])
                padding = more = 0
            calls[-1].append(row)
            padding += more
            total += more
        if total <= limit:
            return calls
        allowance = allowance * 9 // 10


def attended(lengths: tuple[int, ...]) -> int:
    """Tokens that the attention calls compute for these rows, padding included."""
    return sum(len(call) * lengths[call[0]] for call in shared_calls(lengths))
