"""Parquet and Arrow files: any row at once, of sets larger than memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data.order import WINDOW
from aligner.data.sources.plain_values import plain
from aligner.data.sources.sampled_digest import digest_of_file
from aligner.data.sources.source import LabelledRow, NoRowsError

BLOCK_ROWS = 16_384
"""Most rows of a block."""
BLOCK_BYTES = 1 << 24
"""Bytes of a block, uncompressed, as far as the file's footer says."""
KEPT_BLOCKS = WINDOW + 1
"""Decoded blocks that are kept: those of one window of the order."""


@dataclass(frozen=True)
class _Block:
    """Rows that are decoded together."""

    groups: list[int]
    """Row groups, all of them as a whole; or the one of which it is a part."""
    number: int | None
    """Which part of the row group; None: whole ones."""
    rows: int
    size: int
    """Rows of the row group's parts, but for the last."""


class ParquetRows:
    """Rows of a parquet file. Row groups are decoded in blocks, a few of which are kept; a row of a large row group
    costs its decoding up to there."""

    def __init__(self, name: str, path: Path) -> None:
        """Raises ValueError: no rows (NoRowsError), or no parquet file."""
        import pyarrow
        import pyarrow.parquet

        self.name, self._path = name, path
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{name}: {path} is a damaged parquet file ({_line(error)}); fetch it again.") from None
        footer = self._file.metadata
        self._rows = footer.num_rows
        if not self._rows:
            raise NoRowsError(f"{name} has no rows: {path}.")
        self._parts = _blocks_of(
            [(group.num_rows, group.total_byte_size) for group in map(footer.row_group, range(footer.num_row_groups))]
        )
        ends = np.cumsum([part.rows for part in self._parts]).tolist()
        self._blocks = [range(end - part.rows, end) for part, end in zip(self._parts, ends, strict=True)]
        self._ends = np.array(ends)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._open: tuple[int, int, Iterator[Any]] | None = None
        """A large row group that is being decoded: its number, the next block in it, its batches."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0.

        Raises:
            ValueError: its row group is damaged, or it has a value that Python does not have.
        """
        block = int(np.searchsorted(self._ends, index, side="right"))
        label = f"{self._path}, row {index + 1}"
        with self._lock:
            batch = self._block(block, label)
        return label, _row_of(batch, index - self._blocks[block].start, label)

    def blocks(self) -> Sequence[range]:
        """Row groups: several small ones, or parts of a large one."""
        return self._blocks

    def digest(self) -> str:
        """Of the file's size and samples of it, among them its footer."""
        return digest_of_file(self._path)

    def _block(self, block: int, label: str) -> Any:
        """The rows of one block, decoded."""
        import pyarrow

        if block in self._kept:
            self._kept.move_to_end(block)
            return self._kept[block]
        part = self._parts[block]
        try:
            table = self._file.read_row_groups(part.groups) if part.number is None else self._batch(part)
        except (pyarrow.ArrowException, OSError) as error:
            self._open = None
            raise ValueError(
                f"{label}: row group {part.groups[0]} is damaged ({_line(error)}); fetch the file again."
            ) from None
        self._kept[block] = table
        if len(self._kept) > KEPT_BLOCKS:
            self._kept.popitem(last=False)
        return table

    def _batch(self, part: _Block) -> Any:
        """A part of a large row group, which is decoded from where the last one ended, or from its beginning."""
        (group,), number = part.groups, part.number or 0
        if self._open is None or self._open[0] != group or self._open[1] > number:
            self._open = (group, 0, self._file.iter_batches(part.size, row_groups=[group]))
        for skipped in range(self._open[1], number + 1):
            batch = next(self._open[2])
            self._open = (group, skipped + 1, self._open[2])
        assert batch.num_rows == part.rows, "batches are whole, but for the last of a row group"
        return batch


def _blocks_of(groups: Sequence[tuple[int, int]]) -> list[_Block]:
    """Blocks of about BLOCK_ROWS rows or BLOCK_BYTES bytes: several small row groups, or a part of a large one.

    Args:
        groups: (rows, bytes uncompressed) of each row group.
    """
    blocks: list[_Block] = []
    small: list[int] = []
    for group, (rows, content) in enumerate(groups):
        fits = _fits(rows, content)
        if small and not (fits and _fits(*(sum(groups[n][k] for n in [*small, group]) for k in (0, 1)))):
            blocks.append(_Block(small, None, sum(groups[n][0] for n in small), 0))
            small = []
        if fits:
            small.append(group)
            continue
        size = max(1, min(BLOCK_ROWS, BLOCK_BYTES * rows // max(1, content)))
        for number, first in enumerate(range(0, rows, size)):
            blocks.append(_Block([group], number, min(size, rows - first), size))
    if small:
        blocks.append(_Block(small, None, sum(groups[n][0] for n in small), 0))
    return [block for block in blocks if block.rows]


def _fits(rows: int, content: int) -> bool:
    return rows <= BLOCK_ROWS and content <= BLOCK_BYTES


class ArrowRows:
    """Rows of an Arrow file or stream (as `datasets` keeps them), mapped into memory: any row costs the same."""

    def __init__(self, name: str, path: Path, stream: bool) -> None:
        """Raises ValueError: no rows (NoRowsError), or a damaged file."""
        import pyarrow

        self.name, self._path = name, path
        try:
            mapped = pyarrow.memory_map(str(path))
            if stream:
                self._batches = list(pyarrow.ipc.open_stream(mapped))
            else:
                opened = pyarrow.ipc.open_file(mapped)
                self._batches = [opened.get_batch(number) for number in range(opened.num_record_batches)]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{name}: {path} is a damaged Arrow file ({_line(error)}); fetch it again.") from None
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        if not len(self._ends) or not self._ends[-1]:
            raise NoRowsError(f"{name} has no rows: {path}.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> LabelledRow:
        """Row `index`, from 0. Raises ValueError: a value that Python does not have."""
        batch = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - (int(self._ends[batch - 1]) if batch else 0)
        label = f"{self._path}, row {index + 1}"
        return label, _row_of(self._batches[batch], offset, label)

    def blocks(self) -> None:
        """Any row costs the same."""
        return None

    def digest(self) -> str:
        """Of the file's size and samples of it."""
        return digest_of_file(self._path)


def _row_of(batch: Any, offset: int, label: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = batch.slice(offset, 1).to_pylist(maps_as_pydicts="strict")[0]
    except (KeyError, ValueError) as error:  # a key twice in a map, text that is not UTF-8
        raise ValueError(f"{label} cannot be read ({_line(error)}); correct the value.") from None
    return {name: plain(value) for name, value in row.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
