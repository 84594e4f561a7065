"""JSON Lines: one object a line, each row with its line number; any line is found by an index of where lines begin."""

from __future__ import annotations

import json
import mmap
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aligner.data.sources.sampled_digest import digest_of_file
from aligner.data.sources.source import LabelledRow, NoRowsError

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape of a UTF-16 surrogate, possibly part of a valid pair."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK = 1 << 24
"""Bytes that are searched for line ends at a time."""
BLANKS = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
NEWLINE = ord("\n")


class JsonLines:
    """The lines of one file, or of its decompressed contents; blank lines are no rows."""

    def __init__(self, name: str, path: Path, content: bytes | None = None) -> None:
        """
        Args:
            name: what errors call the whole, "data.path=...".
            path: the file, UTF-8; it is mapped into memory, not read.
            content: what it decompresses to, where it is compressed.

        Raises:
            NoRowsError: it has no rows.
        """
        self.name, self._path = name, path
        self._in_memory = content is not None
        self._bytes: bytes | mmap.mmap = _mapped(path) if content is None else content
        self._begins, self._numbers = _index(self._bytes)
        if not len(self):
            raise NoRowsError(f"{name} has no rows; give a file with one JSON object a line.")

    def __len__(self) -> int:
        return len(self._begins) - 1 if self._numbers is None else len(self._numbers)

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0.

        Raises:
            ValueError: the line is not a JSON object of valid Unicode; file and line are named.
        """
        line = index if self._numbers is None else int(self._numbers[index])
        label = f"{self._path}:{line + 1}"
        text = self._bytes[int(self._begins[line]) : int(self._begins[line + 1])]
        return label, parse_object((text if line else text.removeprefix(BYTE_ORDER_MARK)).rstrip(), label)

    def blocks(self) -> None:
        """Any row costs the same."""
        return None

    def digest(self) -> str:
        """Of the file's size and samples of it, or of the whole where it is in memory."""
        return xxhash.xxh3_128_hexdigest(self._bytes) if self._in_memory else digest_of_file(self._path)


def parse_object(line: bytes, label: str) -> dict[str, Any]:
    """One line's object.

    Raises:
        ValueError: it is not a JSON object of valid Unicode; the text begins with `label`.
    """
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
        check_surrogates(row, label)
    return row


def check_surrogates(value: Any, label: str, place: str = "") -> None:
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
            check_surrogates(key, label)
            check_surrogates(item, label, f"{place}[{key!r}]" if place else repr(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_surrogates(item, label, f"{place}[{number}]")


def _mapped(path: Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""  # which cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _index(content: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray | None]:
    """(byte where each line begins, and where the last ends; the lines that are not blank, or None where all are so)."""
    data = np.frombuffer(content, dtype=np.uint8)
    ends = [
        np.flatnonzero(data[start : start + CHUNK] == NEWLINE) + (start + 1) for start in range(0, len(data), CHUNK)
    ]
    begins = np.concatenate([np.zeros(1, np.int64), *ends])
    if begins[-1] != len(data):
        begins = np.append(begins, len(data))
    lines = len(begins) - 1
    mark = len(BYTE_ORDER_MARK) if content[: len(BYTE_ORDER_MARK)] == BYTE_ORDER_MARK else 0
    firsts = begins[:-1].copy()
    firsts[:1] = mark
    seem_blank = np.isin(data[firsts], BLANKS) if mark < len(data) else np.ones(lines, bool)
    blank = [
        line
        for line in np.flatnonzero(seem_blank).tolist()
        if not content[int(firsts[line]) : int(begins[line + 1])].strip()
    ]
    return begins, np.delete(np.arange(lines), blank) if blank else None
