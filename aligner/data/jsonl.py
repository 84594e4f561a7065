"""Read a JSONL file row by row, each row with a label that says where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LabelledRow = tuple[str, dict[str, Any]]
"""("prompts.jsonl:17", the object on line 17)."""


def rows(path: str | Path, setting: str = "data.path") -> Iterator[LabelledRow]:
    """Yield (label, object) for each line that is not blank.

    Args:
        path: the file, UTF-8, one JSON object a line.
        setting: the configuration field that holds `path`, for the errors.

    Raises:
        ValueError: no such file, no rows, or a line that is not a JSON object (file and line are named).
    """
    file = Path(path)
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"{setting}={path} {found}; give a file with one JSON object a line.")
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
    if not isinstance(row, dict):
        raise ValueError(f'{label} is a JSON {type(row).__name__}, not an object such as {{"prompt": "..."}}.')
    return row
