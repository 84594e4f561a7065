"""`open_source`: data.path, or the path of a tool, as a `RowSource`."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from aligner.data.sources.decompress import decompressed
from aligner.data.sources.documents import json_rows, table_rows
from aligner.data.sources.file_kinds import (
    ARROW_FILE,
    ARROW_STREAM,
    COMPRESSED,
    CSV,
    HEAD_BYTES,
    JSON,
    PARQUET,
    TSV,
    UnreadableFileError,
    kind_of,
)
from aligner.data.sources.hub import hub_rows, is_saved, saved_rows
from aligner.data.sources.jsonl import JsonLines
from aligner.data.sources.shards import files_of_split
from aligner.data.sources.source import Joined, NoRowsError, RowList, RowSource
from aligner.data.sources.tables import ArrowRows, ParquetRows

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")
"""owner/name, or owner/name/subset."""


def open_source(
    path: str | Path | Sequence[str],
    setting: str = "data.path",
    split: str = "train",
    split_setting: str = "data.split",
) -> RowSource:
    """The rows of files.

    Args:
        path: a file (JSON Lines, JSON, CSV, TSV, parquet, Arrow; text also compressed), a folder of `save_to_disk` or of
            data files, a glob, the name of a data set on a hub, or several of these.
        setting: where `path` was written, for errors.
        split: which part of a set that has several.
        split_setting: where `split` was written.

    Raises:
        ValueError: no such file, one that is no data file, or no rows; names the setting and what would work.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise ValueError(f"{setting}=[] names no file; give at least one.")
    name = f"{setting}={path if isinstance(path, (str, Path)) else '[' + ','.join(map(str, path)) + ']'}"
    openers = [opener for one in paths for opener in _parts(str(one), setting, split, split_setting)]
    parts, empty = [], NoRowsError()
    for opener in openers:
        try:
            parts.append(opener())
        except NoRowsError as error:  # of several files, some may be empty: the last of many shards, say
            empty = error
    if not parts:
        raise empty if len(openers) == 1 else NoRowsError(f"{name} has no rows: its {len(openers)} files are empty.")
    return parts[0] if len(parts) == 1 else Joined(name, parts)


def _parts(path: str, setting: str, split: str, split_setting: str) -> list[Callable[[], RowSource]]:
    """What opens each file of a path."""
    place, name = Path(path), f"{setting}={path}"
    if place.is_dir():
        if is_saved(place):
            return [partial(saved_rows, name, place, split, split_setting)]
        return [partial(_file_rows, name, file) for file in files_of_split(place, split, setting, split_setting)]
    if place.exists():
        return [partial(_file_rows, name, place)]
    if "://" in path:
        raise ValueError(f"{name}: URLs are not opened; download the file first.")
    if any(letter in path for letter in "*?["):
        files = sorted(Path(one) for one in glob.glob(path, recursive=True) if Path(one).is_file())
        if not files:
            raise ValueError(f"{name} matches no file{_hint(place.parent)}")
        return [partial(_file_rows, name, file) for file in files]
    if (
        HUB_NAME.fullmatch(path)
        and not place.parent.is_dir()
        and not re.search(r"\.(jsonl?|csv|parquet|arrow)\b", path)
    ):
        return [partial(hub_rows, name, path, split, split_setting)]
    close = difflib.get_close_matches(place.name, _names(place.parent), 1)
    raise ValueError(
        f"{name} does not exist{f'; did you mean {place.with_name(close[0])}?' if close else _hint(place.parent)}"
    )


def _file_rows(name: str, file: Path) -> RowSource:
    try:
        with file.open("rb") as opened:
            kind = kind_of(file, opened.read(HEAD_BYTES))
        content = decompressed(file, kind) if kind in COMPRESSED else None
        if content is not None:
            kind = kind_of(file, content[:HEAD_BYTES])
            if kind in COMPRESSED or kind in (PARQUET, ARROW_FILE, ARROW_STREAM):
                raise UnreadableFileError(
                    f"is compressed, and holds another file ({kind}) as it is; decompress it first."
                )
        return _rows_of_kind(name, file, kind, content)
    except NoRowsError:
        raise
    except (OSError, UnreadableFileError) as error:
        problem = f"cannot be read: {error.strerror}." if isinstance(error, OSError) else str(error)
        raise ValueError(f"{name}{f': {file}' if not name.endswith(f'={file}') else ''} {problem}") from None


def _rows_of_kind(name: str, file: Path, kind: str, content: bytes | None) -> RowSource:
    if kind == PARQUET:
        return ParquetRows(name, file)
    if kind in (ARROW_FILE, ARROW_STREAM):
        return ArrowRows(name, file, kind == ARROW_STREAM)
    if kind in (CSV, TSV):
        return RowList(name, table_rows(_whole(file, content), file, "," if kind == CSV else "\t"))
    if kind == JSON:
        return RowList(name, json_rows(_whole(file, content), file))
    return JsonLines(name, file, content)


def _whole(file: Path, content: bytes | None) -> bytes:
    """A file's bytes, or what they decompress to, which may be nothing."""
    return file.read_bytes() if content is None else content


def _names(folder: Path) -> list[str]:
    try:
        return [file.name for file in folder.iterdir()]
    except OSError:
        return []


def _hint(folder: Path) -> str:
    if not folder.is_dir():
        return f"; there is no folder {folder}." if str(folder) else "."
    names = sorted(name for name in _names(folder) if not name.startswith("."))[:5]
    return f"; {folder} holds {', '.join(names) or 'nothing'}."
