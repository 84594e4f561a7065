"""Read a JSONL file row by row, each row with a label "file:line" for errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligner.data.formats import HEAD_BYTES, conversion_hint, folder_hint, missing_hint

LabelledRow = tuple[str, dict[str, Any]]
"""("prompts.jsonl:17", the object on line 17)."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape of a UTF-16 surrogate, possibly part of a valid pair."""


def rows(path: str | Path, setting: str = "data.path") -> Iterator[LabelledRow]:
    """Yield (label, object) for each line that is not blank.

    Args:
        path: the file, UTF-8, one JSON object a line.
        setting: the configuration field that holds `path`, for the errors.

    Raises:
        ValueError: no such file, another format (the message names a command that converts it), no rows, or a line that is
            not a JSON object of valid Unicode (file and line are named).
    """
    file = Path(path)
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        hint = folder_hint(file) if file.is_dir() else missing_hint(str(path))
        raise ValueError(f"{setting}={path} {problem}; give a file with one JSON object a line.{hint}")
    empty = True
    for number, line in enumerate(_lines(file, setting), start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte-order mark is not JSON
        if text.strip():
            empty = False
            label = f"{path}:{number}"
            yield label, _parse(text.rstrip(), label)
    if empty:
        raise ValueError(f"{setting}={path} has no rows; give a file with one JSON object a line.")


def _lines(file: Path, setting: str) -> Iterator[bytes]:
    try:
        with file.open("rb") as lines:
            hint = conversion_hint(file, lines.read(HEAD_BYTES))
            if hint is not None:
                raise ValueError(f"{setting}={file} {hint}")
            lines.seek(0)
            yield from lines
    except OSError as error:
        raise ValueError(f"{setting}={file} cannot be read: {error.strerror}.") from None


def _parse(line: bytes, label: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{label} is not UTF-8 text: {error}.") from None
    except RecursionError:
        raise ValueError(f"{label} is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{label} is not valid JSON: {error.msg} at column {error.colno}.") from None
    except ValueError:  # integers beyond Python's digit limit
        limit = sys.get_int_max_str_digits()
        raise ValueError(f"{label} has an integer of more than {limit} digits; write it as text.") from None
    if not isinstance(row, dict):
        raise ValueError(f'{label} is a JSON {type(row).__name__}, not an object such as {{"prompt": "..."}}.')
    if SURROGATE.search(line):
        _check_surrogates(row, label)
    return row


def _check_surrogates(value: Any, label: str, place: str = "") -> None:
    """Raises ValueError for a lone surrogate, which UTF-8 cannot encode and tokenizers reject."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = json.dumps(value[error.start])[1:-1]
            raise ValueError(
                f"{label} has {half} in {place or 'a key'}: half of a surrogate pair, which is not a character; write the "
                "whole pair, or remove it."
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, label)
            _check_surrogates(item, label, f"{place}[{key!r}]" if place else repr(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_surrogates(item, label, f"{place}[{number}]")
