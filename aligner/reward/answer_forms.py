"""Types of parsed answers: words, multiple choice, quantity with unit, list or interval, ratio, time, equation, formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aligner.reward.units import Unit


@dataclass(frozen=True)
class Answer:
    """A parsed answer."""

    source: str
    """Its normalised text."""


@dataclass(frozen=True)
class Words(Answer):
    """Text, or letters that may be text."""

    spelling: str
    """Only its letters and digits, case folded."""


@dataclass(frozen=True)
class Choice(Answer):
    """An option of a multiple-choice question: its letter, and the answer given next to it, if any."""

    letter: str
    rest: Answer | None


@dataclass(frozen=True)
class Quantity(Answer):
    """A number or an expression, with an optional unit."""

    value: Any
    """Fraction, or a SymPy expression."""
    exact: bool = True
    """False: a decimal number, which may be rounded."""
    unit: Unit | None = None
    percent: bool = False
    base: int | None = None
    """Base of a numeral such as 101_2; `value` has its digits read in base ten."""


@dataclass(frozen=True)
class Items(Answer):
    """A list, set, tuple or interval."""

    brackets: str
    """"" (bare list), "{}", "()", "[]", "(]" or "[)"."""
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Ratio(Answer):
    """A ratio such as 3:4, which may also be a time of day."""

    parts: tuple[Any, ...]
    clock: Clock | None


@dataclass(frozen=True)
class Clock(Answer):
    """A time of day."""

    seconds: int
    """Seconds since midnight as written (below half a day unless the hour is 13 or more)."""
    half: str | None
    """"a" (a.m.), "p" (p.m.), or None if not given."""


@dataclass(frozen=True)
class Equation(Answer):
    """x = 3, or a chain of equations; `last` is its last side."""

    name: str | None
    """The left side of the first equals sign, if it is just a name."""
    last: Answer
    closed: bool
    """Whether the other sides have no variables, so that the equation is equivalent to `last`."""


@dataclass(frozen=True)
class Formula(Answer):
    """An object compared by math-verify: relation, set, matrix."""

    value: Any


def is_prose(form: Answer) -> bool:
    """Whether it is text or a list that contains text, as a sentence would be parsed."""
    return isinstance(form, Words) or (isinstance(form, Items) and any(map(is_prose, form.items)))
