"""Rows with data.columns and data.format applied: what the tokenizers of a data.kind are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligner.data.columns import Columns
from aligner.data.digest import digest
from aligner.data.formats import FORMATS, converted, with_turns
from aligner.data.json_text import with_conversations
from aligner.data.sources.source import LabelledRow, RowSource

NEEDED = ("prompt", "messages", "completion", "chosen", "rejected", "query", "response", "label", "score")
"""Keys of ours that no row can do without, where data.columns has them; of prompts the first two, and the others are fields."""


class MappedRows:
    """A source whose rows have our keys, without columns that are null, and with conversations that were JSON text."""

    def __init__(
        self,
        source: RowSource,
        columns: Mapping[str, str] | None,
        format_name: str | None,
        kind: str,
        chat: bool | None,
    ) -> None:
        """
        Args:
            columns: data.columns, applied first.
            format_name: data.format; None: rows are ours already.
            kind: data.kind.
            chat: texts become turns of a conversation; None: they stay as they are.

        Raises:
            ValueError: an unknown format, or one that does not have this kind of rows.
        """
        self.name, self._source = source.name, source
        self._columns = Columns(columns) if columns else None
        self._format, self._kind, self._chat = format_name, kind, bool(chat)
        check_format(format_name, kind)

    def __len__(self) -> int:
        return len(self._source)

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0, with our keys.

        Raises:
            ValueError: a column that is missing or of another type; the text begins with the row's label.
        """
        label, row = self._source.row(index)
        if self._columns is not None:
            row = self._columns.renamed(row, label)
            self._check_null(row, self._columns, label)
        row = with_conversations({name: value for name, value in row.items() if value is not None})
        if self._format is not None:
            return label, converted(row, label, self._format, self._kind, self._chat)
        return label, with_turns(row, as_messages=self._kind == "prompts") if self._chat else row

    def _check_null(self, row: dict[str, Any], columns: Columns, label: str) -> None:
        """Raises ValueError for a column without a value that is needed; a format says itself what it needs."""
        needed = NEEDED[:2] if self._kind == "prompts" else NEEDED
        null = [key for key in columns.columns if row[key] is None and key in needed]
        if null and self._format is None:
            column = columns.columns[null[0]]
            raise ValueError(
                f"{label}: {column!r} is null (data.columns.{null[0]}={column}); give each row a value, or leave such rows out: "
                "data.on_error=skip."
            )

    def blocks(self) -> Sequence[range] | None:
        """The source's."""
        return self._source.blocks()

    def digest(self) -> str:
        """Of the source, and of what is made of its rows."""
        if self._columns is None and self._format is None and not self._chat:
            return self._source.digest()
        made_of = [self._columns.columns if self._columns else {}, self._format, self._kind, self._chat]
        return digest([self._source.digest(), made_of])


def check_format(format_name: str | None, kind: str) -> None:
    """Raises ValueError for an unknown data.format, or one that does not have rows of data.kind."""
    if format_name is None:
        return
    if format_name not in FORMATS:
        raise ValueError(f"data.format={format_name} is unknown; use {', '.join(FORMATS)}, or null.")
    kinds = FORMATS[format_name].kinds
    if kind not in kinds:
        raise ValueError(
            f"data.format={format_name} gives {', '.join(kinds)}, not data.kind={kind}; use data.kind={kinds[-1]}, or another "
            "format."
        )
