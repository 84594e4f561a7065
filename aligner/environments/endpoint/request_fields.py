"""Read a request's JSON: each field is used, is known to change nothing here, or is refused by name with a 400."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aligner.environments.endpoint.errors import ApiError, bad_request


def parse_object(body: bytes) -> dict[str, Any]:
    """A request's body as a JSON object. Raises ApiError 400."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise bad_request(f"The body is not valid JSON: {str(error) or type(error).__name__}.") from None
    if b"\\ud" in body.lower():  # half of a surrogate pair is JSON, but no text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request("The body has half of a surrogate pair (\\ud800 to \\udfff), which is no text.") from None
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, not {type(value).__name__}.")
    return value


class Fields:
    """The fields of a JSON object, read once each; null is as if the field were missing."""

    def __init__(self, value: Mapping[str, Any], prefix: str = "") -> None:
        """Args:
        prefix: where the object stands in the request, for errors ("sampling_params.").
        """
        self._left = {name: item for name, item in value.items() if item is not None}
        self._prefix = prefix

    def take(self, name: str) -> Any:
        """A field of any type; None if it is missing."""
        return self._left.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def object(self, name: str) -> Fields:
        """The fields of an object; none if it is missing."""
        value = self._left.pop(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self._prefix}{name}.")

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self._left.pop(name, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def integer(self, name: str, low: int) -> int | None:
        """A whole number >= low."""
        value = self._left.pop(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise self.wrong(name, value, f"a whole number of {low} or more")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from low to high."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...] | None:
        """A list of token ids."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [None]
        if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise self.wrong(name, value, f"a list of token ids from 0 to {vocab_size - 1}")
        return tuple(ids)

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings, none of them empty; () if it is missing."""
        value = self._left.pop(name, None)
        strings = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(strings, list) or not all(isinstance(one, str) and one for one in strings):
            raise self.wrong(name, value, "a string or a list of strings, none of them empty")
        return tuple(strings)

    def one_of(self, name: str, values: Sequence[str]) -> str:
        """One of these strings; the first if the field is missing."""
        value = self._left.pop(name, values[0])
        if value not in values:
            raise self.wrong(name, value, " or ".join(map(json.dumps, values)))
        return str(value)

    def ignore(self, names: Collection[str]) -> None:
        """Fields that change nothing here, whatever they say."""
        for name in names:
            self._left.pop(name, None)

    def only(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Fields of which only the values that change nothing are supported."""
        for name, values in neutral.items():
            value = self._left.pop(name, None)
            if value is not None and not any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in values
            ):
                raise self.wrong(
                    name, value, " or ".join(map(json.dumps, values)) + ", or left out: others are not supported"
                )

    def end(self) -> None:
        """Raises ApiError for fields that nobody has read."""
        if self._left:
            names = ", ".join(self._prefix + name for name in sorted(self._left))
            raise bad_request(
                f"Not supported: {names}. Leave it out.", self._prefix + min(self._left), "unsupported_field"
            )

    def wrong(self, name: str, value: Any, wanted: str) -> ApiError:
        """The error for a field that is not as it must be."""
        shown = json.dumps(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return bad_request(
            f"{self._prefix}{name} must be {wanted}; it is {shown}.", self._prefix + name, "invalid_value"
        )
