"""Right and wrong answers of the addition task, direct and in columns."""

from __future__ import annotations

import random
from collections.abc import Mapping

MARKER = "#"


def direct_answer(left: int, right: int) -> str:
    """137, 485 -> "#622"."""
    return f"{MARKER}{left + right}"


def column_answer(left: int, right: int, slips: Mapping[int, int] | None = None) -> str:
    """137, 485 -> "7+5+0=12 3+8+1=12 1+4+1=06#622": each column with its carry, from the right.

    Args:
        slips: column from the right -> error added to its total, which propagates through the carry: {1: -2} gives
            "7+5+0=12 3+8+1=10 1+4+1=06#602". Every total must stay in 0..19.
    """
    columns, digits = [], ""
    carry = total = 0
    for place, (a, b) in enumerate(zip(reversed(str(left)), reversed(str(right)), strict=True)):
        total = int(a) + int(b) + carry + (slips or {}).get(place, 0)
        assert 0 <= total <= 19, f"column {place} of {left}+{right} would be {total}"
        columns.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
        digits = f"{total % 10}{digits}"
    return " ".join(columns) + f"{MARKER}{int(f'{carry}{digits}')}"


def wrong_number(answer: str, digits: int, chance: random.Random) -> str:
    """The answer with up to `digits` digits of its final number replaced by other digits."""
    work, _, number = answer.rpartition(MARKER)
    written = list(number)
    for place in chance.sample(range(len(written)), min(digits, len(written))):
        lowest = 1 if place == 0 and len(written) > 1 else 0  # a leading 0 would give the mistake away
        written[place] = str(chance.choice([d for d in range(lowest, 10) if d != int(written[place])]))
    return f"{work}{MARKER}{''.join(written)}"


def wrong_columns(left: int, right: int, digits: int, chance: random.Random) -> str:
    """A column answer with up to `digits` wrong columns, and the (wrong) final number that they imply."""
    slips: dict[int, int] = {}
    carry = 0
    terms = list(zip(reversed(str(left)), reversed(str(right)), strict=True))
    slipping = chance.sample(range(len(terms)), min(digits, len(terms)))
    for place, (a, b) in enumerate(terms):
        total = int(a) + int(b) + carry
        if place in slipping:
            # A different last digit, so that no later mistake can cancel this one.
            wrong = chance.choice([t for t in range(20) if t % 10 != total % 10])
            slips[place] = wrong - total
            total = wrong
        carry = total // 10
    return column_answer(left, right, slips)


def malformed(answer: str, chance: random.Random) -> str:
    """The answer without its marker, or truncated right after it, so that no number can be parsed."""
    work, _, number = answer.rpartition(MARKER)
    return chance.choice([f"{work}{number}", f"{work}{MARKER}"])
