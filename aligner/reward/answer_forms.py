"""What an answer may be: words, a choice, a quantity with its unit, a list or interval, a ratio, a time, an equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aligner.reward.units import Unit


@dataclass(frozen=True)
class MessageLayout:
    """An answer that was read."""

    source: str
    """Its text, tidied."""


@dataclass(frozen=True)
class Words(MessageLayout):
    """Text, or letters that may be text."""

    spelling: str
    """Letters and digits alone, case folded."""


@dataclass(frozen=True)
class Choice(MessageLayout):
    """An option of a multiple choice: its letter, and what stands beside it."""

    letter: str
    rest: MessageLayout | None


@dataclass(frozen=True)
class Quantity(MessageLayout):
    """A number or an expression, with its unit."""

    value: Any
    """Fraction, or a SymPy expression."""
    exact: bool = True
    """False: a decimal number, which may be rounded."""
    unit: Unit | None = None
    percent: bool = False
    base: int | None = None
    """Of a numeral such as 101_2, whose value is what its digits say in base ten."""


@dataclass(frozen=True)
class Items(MessageLayout):
    """A list, set, tuple or interval."""

    brackets: str
    """"" (bare list), "{}", "()", "[]", "(]" or "[)"."""
    items: tuple[MessageLayout, ...]


@dataclass(frozen=True)
class Ratio(MessageLayout):
    """3:4, which may be a time of the day."""

    parts: tuple[Any, ...]
    clock: Clock | None


@dataclass(frozen=True)
class Clock(MessageLayout):
    """A time of the day."""

    seconds: int
    """Since midnight, as written: below half a day, unless the hour is 13 or more."""
    half: str | None
    """a, p, or None where it is not said."""


@dataclass(frozen=True)
class Equation(MessageLayout):
    """x = 3, or a chain of equations; `last` is its last side."""

    name: str | None
    """What stands before the first sign, where it is no more than a name."""
    last: MessageLayout
    closed: bool
    """Whether the other sides have no variables, so that it says no more than `last`."""


@dataclass(frozen=True)
class Formula(MessageLayout):
    """What only math-verify compares: relations, sets, matrices."""

    value: Any


def is_prose(form: MessageLayout) -> bool:
    """Whether it is text, or a list with text in it, which a sentence may be taken for."""
    return isinstance(form, Words) or (isinstance(form, Items) and any(map(is_prose, form.items)))
