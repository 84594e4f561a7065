"""Read a JSONL file row by row, each row with a label that says where it stands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligner.data.formats import HEAD_BYTES, folder_hint, missing_hint, other_form

LabelledRow = tuple[str, dict[str, Any]]
"""("prompts.jsonl:17", the object on line 17)."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape of half a character, perhaps with its other half beside it."""


def rows(path: str | Path, setting: str = "data.path") -> Iterator[LabelledRow]:
    """Yield (label, object) for each line that is not blank.

    Args:
        path: the file, UTF-8, one JSON object a line.
        setting: the configuration field that holds `path`, for the errors.

    Raises:
        ValueError: no such file, one of another form (the message says what makes JSONL of it), no rows, or a line that
            is not a JSON object of whole characters (file and line are named).
    """
    file = Path(path)
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        hint = folder_hint(file) if file.is_dir() else missing_hint(str(path))
        raise ValueError(f"{setting}={path} {found}; give a file with one JSON object a line.{hint}")
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
            form = other_form(file, lines.read(HEAD_BYTES))
            if form is not None:
                raise ValueError(f"{setting}={file} {form}")
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
    except ValueError:  # Python reads no longer ones
        limit = sys.get_int_max_str_digits()
        raise ValueError(f"{label} has a whole number of more than {limit} digits; write it as text.") from None
    if not isinstance(row, dict):
        raise ValueError(f'{label} is a JSON {type(row).__name__}, not an object such as {{"prompt": "..."}}.')
    if SURROGATE.search(line):
        _check_characters(row, label)
    return row


def _check_characters(value: Any, label: str, place: str = "") -> None:
    """An escape may write half of a surrogate pair, which no tokenizer takes: UTF-8 has no bytes for it."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = json.dumps(value[error.start])[1:-1]
            raise ValueError(
                f"{label} has {half} in {place or 'a key'}: half of a surrogate pair, which is no character; write the "
                "whole pair, or leave it out."
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_characters(key, label)
            _check_characters(item, label, f"{place}[{key!r}]" if place else repr(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_characters(item, label, f"{place}[{number}]")
