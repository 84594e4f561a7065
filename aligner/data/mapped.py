"""Rows with data.columns and data.format applied: what the tokenizers of a data.kind are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aligner.data.columns import Columns
from aligner.data.digest import digest
from aligner.data.formats import FORMATS, converted, with_turns
from aligner.data.sources.source import LabelledRow, RowSource


class MappedRows:
    """A source whose rows have our keys."""

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
        if self._format is not None:
            return label, converted(row, label, self._format, self._kind, self._chat)
        return label, with_turns(row, as_messages=self._kind == "prompts") if self._chat else row

    def blocks(self) -> Sequence[range] | None:
        """The source's."""
        return self._source.blocks()

    def digest(self) -> str:
        """Of the source, and of what is made of its rows."""
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
