"""Columns of a row in a named format, checked: what is missing or of another type is an error that says what was expected."""

from __future__ import annotations

from typing import Any, NoReturn

from aligner.data.json_text import parsed
from aligner.data.tokenizer import shortened

Row = dict[str, Any]


class FormatRow:
    """One row of a named format."""

    def __init__(self, row: Row, label: str, name: str, schema: str) -> None:
        """
        Args:
            label: the row's file and line.
            name: the format's.
            schema: its columns, for errors.
        """
        self.row, self.label, self._name, self._schema = row, label, name, schema

    def fail(self, problem: str) -> NoReturn:
        """Raises ValueError with the row's place and the format's columns."""
        raise ValueError(f"{self.label}: {problem}; data.format={self._name} expects {self._schema}.")

    def text(self, column: str) -> str:
        """A column that is text."""
        return self._typed(column, str, "text")

    def optional_text(self, column: str) -> str:
        """A column that is text, or not there: ""."""
        return self.text(column) if self.row.get(column) is not None else ""

    def list(self, column: str) -> list[Any]:
        """A column that is a list with something in it, or its JSON text."""
        value: list[Any] = self._typed(column, list, "a list")
        if not value:
            self.fail(f"column {column!r} is an empty list")
        return value

    def object(self, column: str) -> Row:
        """A column that is an object, or its JSON text."""
        value: Row = self._typed(column, dict, "an object")
        return value

    def within(self, value: Any, place: str) -> FormatRow:
        """An object inside the row (or its JSON text), whose keys are checked likewise.

        Raises:
            ValueError: it is none.
        """
        value = parsed(value)
        if not isinstance(value, dict):
            self.fail(f"{place} must be an object, not {shortened(value)}")
        return FormatRow(value, f"{self.label}: {place}", self._name, self._schema)

    def rest(self, *used: str) -> Row:
        """The other columns, which become fields of the row (for rewards and reports)."""
        return {name: value for name, value in self.row.items() if name not in used}

    def _typed(self, column: str, kind: type, kind_name: str) -> Any:
        if column in self.row and self.row[column] is None:
            self.fail(f"column {column!r} is null")
        if column not in self.row:
            self.fail(f"there is no column {column!r} (the row has {', '.join(map(str, self.row)) or 'nothing'})")
        value = self.row[column] if kind is str else parsed(self.row[column])
        if not isinstance(value, kind):
            self.fail(f"column {column!r} must be {kind_name}, not {shortened(value)}")
        return value
