"""JSON documents and tables of text, which are read as a whole: `.json`, `.csv`, `.tsv`."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from aligner.data.json_text import CONVERSATIONS, with_conversations
from aligner.data.sources.jsonl import BYTE_ORDER_MARK, SURROGATE, check_surrogates
from aligner.data.sources.source import LabelledRow

NUMBERS = ("label", "score", "score_chosen", "score_rejected", "margin")
"""Columns of tables of text whose cells are numbers, or true and false."""
LISTS = ("response", "score", "tools")
"""Columns of tables of text whose cells are read as JSON where they are lists; those of CONVERSATIONS where they are lists of
messages."""


def json_rows(content: bytes, path: Path) -> list[LabelledRow | ValueError]:
    """The rows of a JSON document: one list of objects; an object whose only list holds them ("data"); or objects one after
    the other, each over several lines.

    Returns:
        The rows; an error in place of a wrong one.

    Raises:
        ValueError: none of these; names the file and line.
    """
    text = _text(content, path)
    documents: list[Any] = []
    labels: list[str] = []
    decoder, place, line, counted = json.JSONDecoder(), _after_blanks(text, 0), 1, 0
    while place < len(text):
        try:
            document, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno} is not valid JSON: {error.msg} at column {error.colno}.") from None
        except (RecursionError, ValueError) as error:  # an integer beyond Python's digit limit
            raise ValueError(f"{path}:{line} cannot be read as JSON: {error}.") from None
        line, counted = line + text.count("\n", counted, place), place
        documents.append(document)
        labels.append(f"{path}:{line}")
        place = _after_blanks(text, end)
    if len(documents) == 1 and (rows := _rows_of(documents[0], path)) is not None:
        documents, labels = rows, [f"{path}, row {number}" for number in range(1, len(rows) + 1)]
    escaped = SURROGATE.search(content) is not None
    return [_checked(row, label, escaped) for label, row in zip(labels, documents, strict=True)]


def _checked(row: Any, label: str, escaped: bool) -> LabelledRow | ValueError:
    """The row, or what is wrong with it."""
    if not isinstance(row, dict):
        return ValueError(f'{label} is a JSON {type(row).__name__}, not an object such as {{"prompt": "..."}}.')
    try:
        if escaped:
            check_surrogates(row, label)
    except ValueError as error:
        return error
    return label, row


def table_rows(content: bytes, path: Path, delimiter: str) -> list[LabelledRow | ValueError]:
    """The rows of a table with a header: every cell is text, but for those of NUMBERS, LISTS and CONVERSATIONS.

    Returns:
        The rows; an error in place of one of another number of cells.

    Raises:
        ValueError: no header, a name twice, or no table; names the file and line.
    """
    reader = csv.reader(io.StringIO(_text(content, path), newline=""), delimiter=delimiter, strict=True)
    csv.field_size_limit(sys.maxsize)
    labelled: list[LabelledRow | ValueError] = []
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            label, line = f"{path}:{line}", reader.line_num + 1
            if not header:
                header = _header(cells, label)
            elif cells and len(cells) != len(header):
                labelled.append(
                    ValueError(
                        f"{label} has {len(cells)} cells, and the header has {len(header)} columns ({', '.join(header)}); put "
                        "cells with separators, quotes or line breaks in quotes."
                    )
                )
            elif cells:
                labelled.append((label, {name: _cell(name, text) for name, text in zip(header, cells, strict=True)}))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not valid CSV: {error}.") from None
    return labelled


def _header(cells: list[str], label: str) -> list[str]:
    twice = next((name for name in cells if cells.count(name) > 1), None)
    if twice is not None or not all(name.strip() for name in cells):
        problem = f"the column {twice!r} twice" if twice else "a column without a name"
        raise ValueError(f"{label}: the header has {problem}; give each column one name.")
    return cells


def _cell(name: str, text: str) -> Any:
    """A cell's text, or its value in a column of NUMBERS, LISTS or CONVERSATIONS."""
    if name in CONVERSATIONS:
        return with_conversations({name: text})[name]
    if name not in (*NUMBERS, *LISTS):
        return text
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except (ValueError, RecursionError):
        return text
    wanted = (*((bool, int, float) if name in NUMBERS else ()), *((list,) if name in LISTS else ()))
    return value if isinstance(value, wanted) else text


def _rows_of(document: Any, path: Path) -> list[Any] | None:
    """The rows in a document; None: it is a row itself."""
    if not isinstance(document, dict):
        return document if isinstance(document, list) else None
    lists = [name for name, value in document.items() if isinstance(value, list)]
    if len(document) == 1 and lists and all(isinstance(row, dict) and "role" not in row for row in document[lists[0]]):
        return list(document[lists[0]])
    if lists == ["data"] and document["data"] and all(isinstance(row, dict) for row in document["data"]):
        return list(document["data"])  # beside a version, say
    by_number = bool(document) and all(_is_numbered(column) for column in document.values())
    if (len(lists) > 1 and len(lists) == len(document)) or by_number:
        raise ValueError(
            f"{path} holds columns ({', '.join(document)}), not rows; give a list of objects, or one object a line (of pandas: "
            "to_json(path, orient='records'))."
        )
    return None


def _is_numbered(column: Any) -> bool:
    """Whether it is a column as pandas writes it: row number -> value."""
    return isinstance(column, dict) and bool(column) and all(key.isdigit() for key in column)


def _text(content: bytes, path: Path) -> str:
    try:
        return content.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line} is not UTF-8 text: {error}.") from None


def _after_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place
