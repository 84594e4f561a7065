"""Why rows of a data set were left out, and how many."""

from __future__ import annotations

from collections import Counter

TOO_LONG = "too long"
"""Left out by data.too_long=drop."""
WRONG = "wrong rows"
"""Left out by data.on_error=skip."""

LeftOut = Counter[str]
"""Reason why rows (or pairs) were left out -> number."""


def left_out_text(left_out: LeftOut) -> str:
    """Each reason with its number, for messages."""
    return ", ".join(f"{reason}: {count}" for reason, count in left_out.items() if count) or "no rows"
