"""Secrets: which values are some, and how they are kept out of what is shown and saved (no torch).

Hidden are values under keys that say so (token, password, api_key, ...; everything under `headers`), the values of
environment variables with such names, user names and passwords in URLs, and their query fields with such names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "***"
LAST_WORDS = {
    "token", "secret", "password", "passwd", "passphrase", "authorization", "credential", "credentials", "apikey",
    "bearer", "cookie",
}  # fmt: skip
KINDS_OF_KEYS = {"api", "access", "secret", "private", "auth", "account", "signing", "encryption", "license"}
WHOLE = {"headers", "cookies"}
"""Everything below these keys is hidden."""
SHORTEST = 8
"""Characters of a value that is looked for in text; shorter ones are words of other things too."""
USER_IN_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
FIELD_IN_URL = re.compile(r"([?&]([\w-]+)=)([^&\s#'\"]+)")
BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{8,}")


def is_secret(name: str) -> bool:
    """Whether a key, or an environment variable, says that its value is a secret."""
    words = [word for word in re.split(r"[_\W]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()) if word]
    if not words:
        return False
    return words[-1] in LAST_WORDS or (words[-1] == "key" and (len(words) > 1 and words[-2] in KINDS_OF_KEYS))


def masked(value: Any, key: str = "", whole: bool = False) -> Any:
    """Plain values (dicts, lists, text, numbers) with secrets as ***; references such as ${oc.env:NAME} stay."""
    whole = whole or key.lower() in WHOLE
    if isinstance(value, Mapping):
        return {name: masked(item, str(name), whole) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key, whole) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if whole or is_secret(key):
        reference = isinstance(value, str) and re.fullmatch(r"\$\{[^{}]*\}", value)
        return value if reference else HIDDEN
    return without_patterns(value) if isinstance(value, str) else value


def without_patterns(text: str) -> str:
    """Text without what is known for a secret by its form: in URLs, and after Bearer."""
    text = USER_IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = FIELD_IN_URL.sub(lambda match: match[1] + (HIDDEN if _names_secret(match[2]) else match[3]), text)
    return BEARER.sub(rf"\1\2{HIDDEN}", text)


class Mask:
    """The secrets of one job; made once, before anything is said."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        # the longest first: one may be a part of another
        self.values = sorted({value for value in values if len(value) >= SHORTEST}, key=len, reverse=True)

    @classmethod
    def of(cls, arguments: Sequence[str], config: Mapping[str, Any] | None = None) -> Mask:
        """Those in the environment, in KEY=VALUE arguments and in a configuration of plain values."""
        from_environment = [value for name, value in os.environ.items() if is_secret(name)]
        pairs = (argument.partition("=")[::2] for argument in arguments)
        given = [value.strip("'\"") for key, value in pairs if is_secret(key)]
        return cls([*from_environment, *given, *_values(config or {})])

    def text(self, text: str) -> str:
        """The text without secrets."""
        for value in self.values:
            text = text.replace(value, HIDDEN)
        return without_patterns(text)

    def plain(self, value: Any, key: str = "") -> Any:
        """`masked`, and without the secrets wherever else they stand."""
        value = masked(value, key)
        if isinstance(value, Mapping):
            return {name: self.plain(item, str(name)) for name, item in value.items()}
        if isinstance(value, list):
            return [self.plain(item, key) for item in value]
        return self.text(value) if isinstance(value, str) else value


def _values(value: Any, key: str = "", whole: bool = False) -> Iterator[str]:
    """The secret texts in a configuration."""
    whole = whole or key.lower() in WHOLE
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _values(item, str(name), whole)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _values(item, key, whole)
    elif isinstance(value, str) and key == "token_env":
        yield os.environ.get(value, "").strip()
    elif isinstance(value, str) and (whole or is_secret(key)) and not value.startswith("${"):
        yield value


def _names_secret(field: str) -> bool:
    return is_secret(field) or field.lower() in {"key", "sig", "signature", "auth"}
