"""Bounds of settings, declared beside the field: `steps: Annotated[int, AtLeast(1)] = 100`; one function checks them all.

A dataclass of settings says the bounds of its fields with these classes, and relations between fields in a method
`check()`, which raises ValueError. `--help` prints the bounds; nothing else is to be written down. (No torch.)
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Bound(Protocol):
    """One bound of a setting; a field may have several."""

    @property
    def text(self) -> str:
        """The values that it allows, as they follow "must be" in an error and stand in `--help`."""
        ...

    def allows(self, value: Any) -> bool:
        """Whether a value (never None: null is allowed where the type has it) is inside; a NaN never is."""
        ...


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A number >= `low`."""

    low: float
    note: str = ""
    """Why, or what `low` itself means, such as "0: never"."""

    @property
    def text(self) -> str:
        return f"at least {self.low}" + f" ({self.note})" * bool(self.note)

    def allows(self, value: Any) -> bool:
        return bool(value >= self.low)


@dataclasses.dataclass(frozen=True)
class MoreThan:
    """A number > `low`."""

    low: float
    note: str = ""
    """What to set instead of `low`."""

    @property
    def text(self) -> str:
        return f"more than {self.low}" + f" ({self.note})" * bool(self.note)

    def allows(self, value: Any) -> bool:
        return bool(value > self.low)


@dataclasses.dataclass(frozen=True)
class AtMost:
    """A number <= `high`."""

    high: float

    @property
    def text(self) -> str:
        return f"at most {self.high}"

    def allows(self, value: Any) -> bool:
        return bool(value <= self.high)


@dataclasses.dataclass(frozen=True)
class LessThan:
    """A number < `high`."""

    high: float

    @property
    def text(self) -> str:
        return f"less than {self.high}"

    def allows(self, value: Any) -> bool:
        return bool(value < self.high)


@dataclasses.dataclass(frozen=True)
class Between:
    """A number from `low` to `high`, both included."""

    low: float
    high: float

    @property
    def text(self) -> str:
        return f"between {self.low} and {self.high}"

    def allows(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)


@dataclasses.dataclass(frozen=True)
class Finite:
    """A number that is neither infinite nor NaN."""

    text: typing.ClassVar[str] = "finite"

    def allows(self, value: Any) -> bool:
        return math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class NotEmpty:
    """Text that is not blank."""

    example: str
    """A value that would work."""
    kind: str = "one"
    """Kind of value, such as "a folder"."""

    @property
    def text(self) -> str:
        return f"not empty (such as {self.example})"

    def allows(self, value: Any) -> bool:
        return bool(str(value).strip())


class OneOf:
    """One of some words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    @property
    def text(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def allows(self, value: Any) -> bool:
        return value in self.choices


def bounds_of(hint: Any) -> tuple[Bound, ...]:
    """The bounds in a field's type: `Annotated[int, AtLeast(1)]` has one. Of a list or tuple they are each item's."""
    return tuple(entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Bound))


def hints_with_bounds(kind: type) -> dict[str, Any]:
    """Field -> its type, with the bounds in it."""
    return typing.get_type_hints(kind, include_extras=True)


def dataclass_in(hint: Any) -> Any:
    """The dataclass of a hint such as `X` or `X | None`; None where there is none."""
    options = (hint, *typing.get_args(hint))
    return next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def nullable(hint: Any) -> bool:
    """Whether the type has None: `int | None`, annotated or not."""
    inner = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    return type(None) in typing.get_args(inner)


def shown_bounds(hint: Any) -> str:
    """The bounds in a field's type, for people: "at least 1, or null"; "" where it has none."""
    text = " and ".join(bound.text for bound in bounds_of(hint))
    return f"{text}, or null" if text and nullable(hint) else text


def check_settings(settings: Any, where: str = "") -> None:
    """Check a dataclass of settings and those inside it: bounds in the order of the fields, then each one's `check()`.

    Args:
        where: the setting that holds it, such as "policy"; "" for a whole configuration.

    Raises:
        ValueError: the first value that is out of its bounds, with its setting and the values that would work; or what
            `check()` raises.
    """
    hints = hints_with_bounds(type(settings))
    for entry in dataclasses.fields(settings):
        setting = f"{where}.{entry.name}" if where else entry.name
        value, hint = getattr(settings, entry.name), hints[entry.name]
        if value is not None:
            _check_value(setting, value, hint)
        if dataclasses.is_dataclass(value) and dataclass_in(hint) is not None:
            check_settings(value, setting)
    check = getattr(settings, "check", None)
    if callable(check):
        check()


def _check_value(setting: str, value: Any, hint: Any) -> None:
    items = value if isinstance(value, (list, tuple)) else [value]
    for bound in bounds_of(hint):
        if all(bound.allows(item) for item in items):
            continue
        if isinstance(bound, NotEmpty):
            raise ValueError(f"{setting} has no value; give {bound.kind}, such as {setting}={bound.example}.")
        or_null = ", or null" * nullable(hint)
        if isinstance(bound, OneOf):
            # YAML reads a bare off as the boolean false, which arrives here as False or 'False'.
            unquoted = "off" in bound.choices and str(value).lower() == "false"
            hint_yaml = f' (in YAML, quote it: {setting.rpartition(".")[2]}: "off")' * unquoted
            raise ValueError(f"{setting}={value} is unknown; use {', '.join(bound.choices)}{or_null}{hint_yaml}.")
        each = "each item of " if isinstance(value, (list, tuple)) else ""
        given = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{each}{setting}={given} must be {shown_bounds(hint)}.")
