"""`RowSource`: the rows of a data set by number, each with its place for errors, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from aligner.data.digest import digest

LabelledRow = tuple[str, dict[str, Any]]
"""("prompts.jsonl:17", the object on line 17), or ("train.parquet, row 17", its 17th row)."""


class NoRowsError(ValueError):
    """A file, or a part of a set, that has no rows."""


class RowSource(Protocol):
    """Rows by number, in the order of their files. Any number may be asked for at any time, by several threads in turn."""

    name: str
    """What errors call it: "data.path=train.jsonl"."""

    def __len__(self) -> int:
        """Number of rows, known without reading them; at least 1."""
        ...

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0.

        Raises:
            ValueError: it cannot be read; the text begins with its label. Other rows still can.
        """
        ...

    def blocks(self) -> Sequence[range] | None:
        """Ranges of rows that are decoded together (parts of a parquet file's row groups), in order and covering all rows:
        rows of few blocks at a time are cheap. None: any row costs the same."""
        ...

    def digest(self) -> str:
        """Identity of the contents, independent of where the files are. Cheap: large files are sampled, not read."""
        ...


class RowList:
    """Rows in memory: of a generated task, or of a file that can only be read as a whole."""

    def __init__(self, name: str, rows: Iterable[LabelledRow | ValueError]) -> None:
        """
        Args:
            rows: the rows; an error stands for a wrong one, and is raised when that row is asked for.

        Raises:
            NoRowsError: there are none.
        """
        self.name, self._rows = name, list(rows)
        if not self._rows:
            raise NoRowsError(f"{name} has no rows.")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0. Raises ValueError: it is wrong."""
        row = self._rows[index]
        if isinstance(row, ValueError):
            raise row
        return row

    def blocks(self) -> None:
        """Any row costs the same."""
        return None

    def digest(self) -> str:
        """Of all rows."""
        return digest(None if isinstance(row, ValueError) else row[1] for row in self._rows)


class Joined:
    """Several sources as one, in their order."""

    def __init__(self, name: str, parts: Sequence[RowSource]) -> None:
        self.name, self._parts = name, parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> LabelledRow:
        """Row `index` over all parts, from 0."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part].row(index - (int(self._ends[part - 1]) if part else 0))

    def blocks(self) -> Sequence[range] | None:
        """Those of the parts, where any has some; a part without is one block."""
        of_parts = [part.blocks() for part in self._parts]
        if not any(of_parts):
            return None
        shifted: list[range] = []
        for part, blocks, end in zip(self._parts, of_parts, self._ends.tolist(), strict=True):
            start = end - len(part)
            shifted += [range(block.start + start, block.stop + start) for block in blocks or [range(len(part))]]
        return shifted

    def digest(self) -> str:
        """Of the parts' digests, in their order."""
        return digest(part.digest() for part in self._parts)


def all_rows(source: RowSource) -> Iterator[LabelledRow]:
    """Every row, in order."""
    return (source.row(index) for index in range(len(source)))
