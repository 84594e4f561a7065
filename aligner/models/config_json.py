"""config.json of a Hugging Face folder, field by field: what is asked for is typed, what nobody asked for can be named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class ConfigJson:
    """The fields of one config.json. Asking for one checks its type and marks it as read.

    Types are as strict as transformers' own classes: a number in quotes, a null where there must be a number, or a 1
    for true is refused, since transformers and the engine would refuse it minutes later, or read something else.
    """

    def __init__(self, folder: Path, found: Mapping[str, Any]) -> None:
        self.folder, self._found = folder, found
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def get(self, key: str, default: Any = None) -> Any:
        """The field as it is; `default` where it is absent."""
        self._read.add(key)
        return self._found.get(key, default)

    def error(self, text: str) -> ValueError:
        """To raise: `text` after the file's name."""
        return ValueError(f"{self.folder}/config.json: {text}")

    def size(self, key: str, default: int | None = None, null: bool = False) -> int:
        """A positive whole number.

        Args:
            default: where the field is absent; None: it must be there.
            null: null means `default` too.
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
        """A positive number that is written with a point or an exponent, such as 1e-05."""
        value = self.get(key, default)
        if type(value) is not float or not 0 < value < math.inf:
            raise self.error(f"{key}={value!r} must be a positive number with a decimal point, such as {default}.")
        return value

    def only(self, key: str, allowed: Iterable[Any], why: str = "") -> None:
        """Raises ValueError where the field is there and is none of `allowed`, of which the first is named; and `why`."""
        allowed = tuple(allowed)
        value = self.get(key)
        if key in self and not any(same(value, one) for one in allowed):
            raise self.error(f"{key}={value!r} is not supported; only {key}={json.dumps(allowed[0])} is{why}.")

    def unread(self) -> dict[str, Any]:
        """The fields that nobody asked for."""
        return {key: value for key, value in self._found.items() if key not in self._read}


def same(one: Any, other: Any) -> bool:
    """Equal, and true is not 1."""
    return bool(one == other) and (type(one) is bool) == (type(other) is bool)


def is_number(value: Any) -> bool:
    """A finite number, and not true or false."""
    return type(value) in (int, float) and math.isfinite(value)
