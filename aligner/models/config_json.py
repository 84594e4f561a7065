"""Typed access to a Hugging Face config.json, which also knows the fields that were never read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class ConfigJson:
    """The fields of one config.json. Reading one checks its type and marks it as read.

    Types are as strict as in transformers' classes: a number in quotes, a null instead of a number, or 1 for true is refused,
    since transformers and vLLM would refuse it minutes later, or interpret it otherwise.
    """

    def __init__(self, folder: Path, fields: Mapping[str, Any]) -> None:
        self.folder, self._fields = folder, fields
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str, default: Any = None) -> Any:
        """The field's value, unchecked; `default` if it is absent."""
        self._read.add(key)
        return self._fields.get(key, default)

    def error(self, text: str) -> ValueError:
        """A ValueError to raise: the file's name, then `text`."""
        return ValueError(f"{self.folder}/config.json: {text}")

    def size(self, key: str, default: int | None = None, null: bool = False) -> int:
        """A positive whole number.

        Args:
            default: value if the field is absent; None: the field is required.
            null: whether null also means `default`.
        """
        value = self.get(key)
        if default is not None and (key not in self or (null and value is None)):
            return default
        if type(value) is not int or value < 1:
            raise self.error(f"{key} must be a positive whole number, found {value!r}.")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(f"{key}={value!r} is neither true nor false.")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A positive number, written with a decimal point or an exponent, such as 1e-05."""
        value = self.get(key, default)
        if type(value) is not float or not 0 < value < math.inf:
            raise self.error(f"{key}={value!r} must be a positive number with a decimal point, such as {default}.")
        return value

    def only(self, key: str, allowed: Iterable[Any], why: str = "") -> None:
        """Raises ValueError, naming the first of `allowed` and `why`, if the field is present and none of `allowed`."""
        allowed = tuple(allowed)
        value = self.get(key)
        if key in self and not any(same(value, option) for option in allowed):
            raise self.error(f"{key}={value!r} is not supported; only {key}={json.dumps(allowed[0])} is{why}.")

    def unread(self) -> dict[str, Any]:
        """The fields that were never read."""
        return {key: value for key, value in self._fields.items() if key not in self._read}


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with true != 1."""
    return bool(one == other) and (type(one) is bool) == (type(other) is bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (bool is not)."""
    return type(value) in (int, float) and math.isfinite(value)
