"""Which rows share one call of a padded attention kernel: few calls, and little padding (pure arithmetic)."""

from __future__ import annotations

from collections.abc import Sequence
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


def roots(parents: Sequence[int]) -> int:
    """How many segments without a parent come first."""
    return next((number for number, parent in enumerate(parents) if parent >= 0), len(parents))


def starts(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Position of each segment's first token in its rows."""
    made: list[int] = []
    for parent in parents:
        made.append(made[parent] + lengths[parent] if parent >= 0 else 0)
    return made


def branch_calls(lengths: tuple[int, ...], parents: tuple[int, ...]) -> list[list[int]]:
    """The segments of each further call, after those of the first `roots`: they begin at the same position."""
    start_of = starts(lengths, parents)
    alike: dict[int, list[int]] = {}
    for segment in range(roots(parents), len(lengths)):
        alike.setdefault(start_of[segment], []).append(segment)
    return [
        [members[row] for row in call]
        for members in alike.values()
        for call in shared_calls(tuple(lengths[segment] for segment in members))
    ]


def attended(lengths: tuple[int, ...], parents: tuple[int, ...] | None = None) -> int:
    """Tokens that the attention calls compute for these segments, padding included.

    Args:
        parents: number of each one's parent or -1; None: none has one.
    """
    if parents is None:
        parents = (-1,) * len(lengths)
    calls = [*shared_calls(lengths[: roots(parents)]), *branch_calls(lengths, parents)]
    return sum(len(call) * max(lengths[segment] for segment in call) for call in calls)
