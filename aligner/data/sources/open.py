"""`open_source`: data.path, or the path of a tool, as a `RowSource`."""

from __future__ import annotations

from pathlib import Path

from aligner.data.sources.file_kinds import HEAD_BYTES, conversion_hint, folder_hint, missing_hint
from aligner.data.sources.jsonl import JsonLines
from aligner.data.sources.source import RowSource


def open_source(path: str | Path, setting: str = "data.path") -> RowSource:
    """The rows of a file.

    Args:
        path: the file.
        setting: where `path` was written, for errors.

    Raises:
        ValueError: no such file, a kind of file that is not read (with a command that converts it), or no rows.
    """
    file = Path(path)
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        advice = folder_hint(file) if file.is_dir() else missing_hint(str(path))
        raise ValueError(f"{setting}={path} {problem}; give a file with one JSON object a line.{advice}")
    try:
        with file.open("rb") as opened:
            hint = conversion_hint(file, opened.read(HEAD_BYTES))
        if hint is not None:
            raise ValueError(f"{setting}={file} {hint}")
        return JsonLines(f"{setting}={path}", file)
    except OSError as error:
        raise ValueError(f"{setting}={file} cannot be read: {error.strerror}.") from None
