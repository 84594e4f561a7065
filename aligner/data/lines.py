"""Crash-safe JSONL output, one line per input row, for offline generation: append-only part files merged at the end.

    out.jsonl.settings.json   settings that determine the output, written first
    out.jsonl.part-0          lines of writer 0, in the order written
    out.jsonl                 all lines in row order; written when complete, then the parts are removed

A line has "index" (the row's number) and "key" (a digest of the row's prompt). Several writers, each with its own part,
may work on one file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

Line = dict[str, Any]


class ResumableOutput:
    """One writer of the file `out`; a context manager. See the module docstring."""

    done: dict[int, str]
    """Index -> key of the lines that existed at the start, in any part."""

    def __init__(self, out: str | Path, settings: Mapping[str, Any], part: int = 0) -> None:
        """Start the output, or resume it where an earlier run stopped.

        Args:
            settings: option -> JSON value; must equal those of the earlier run.
            part: number of this writer among the concurrent ones.

        Raises:
            ValueError: the file was started with other settings, is something else, or is being written by another
                process.
        """
        self.out = Path(out)
        self._settings = self.out.with_name(f"{self.out.name}.settings.json")
        self._check(json.loads(json.dumps(settings)))
        self._path = self.out.with_name(f"{self.out.name}.part-{part}")
        self._file: BinaryIO = self._path.open("ab")
        try:
            self._lock_part()
            with self._lock():  # another writer may be merging
                _drop_torn_line(self._path)
                self.done = {line["index"]: line["key"] for line in self._lines()}
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Sequence[Line]) -> None:
        """Append lines and fsync."""
        # json passes lone surrogates through, which UTF-8 cannot encode; write their JSON escapes
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def merge(self, count: int) -> bool:
        """Merge the parts into one file if they have all `count` rows; the last writer to call this does it.

        Returns:
            Whether the file is complete.
        """
        with self._lock():
            parts = [path for path in self._sources() if path != self.out]
            if all(path == self._path and not path.stat().st_size for path in parts) and self.out.is_file():
                return self._is_complete(count)  # nothing to merge
            if not self._is_complete(count):
                return False
            places: dict[int, tuple[Path, int, int]] = {}
            for path in self._sources():
                for start, length, line in _lines_of(path):
                    places.setdefault(line["index"], (path, start, length))
            temporary = self.out.with_name(f".{self.out.name}.merging")
            files = {path: path.open("rb") for path in self._sources()}
            try:
                with temporary.open("wb") as merged:
                    for _, (path, start, length) in sorted(places.items()):
                        files[path].seek(start)
                        merged.write(files[path].read(length))
                    merged.flush()
                    os.fsync(merged.fileno())
                os.replace(temporary, self.out)
            finally:
                for file in files.values():
                    file.close()
                temporary.unlink(missing_ok=True)
            for path in parts:
                path.unlink()
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            if self.out.is_file() and not self._path.stat().st_size:
                self._path.unlink()

    def _lock_part(self) -> None:
        """Lock this writer's part; ValueError if another process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self._path} is being written by another process; wait for it, or stop it.") from None
        except OSError:
            pass  # a file system without locks

    def _check(self, settings: dict[str, Any]) -> None:
        remedy = f"give another --output, or remove {self.out}*"
        if not self._settings.is_file():
            if self.out.exists():
                raise ValueError(f"--output {self.out} exists and has no {self._settings.name} beside it; {remedy}.")
            if not self.out.absolute().parent.is_dir():
                raise ValueError(
                    f"--output {self.out}: the folder {self.out.absolute().parent} does not exist; create it first."
                )
            temporary = self.out.with_name(f".{self._settings.name}.{os.getpid()}")
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self._settings)
            return
        try:
            before = dict(json.loads(self._settings.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{self._settings} is not valid; {remedy}.") from None
        for name in settings | before:
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{name} is {_shown(settings.get(name))} here, but {_shown(before.get(name))} in the run that started "
                    f"{self.out}; use the same, or {remedy}."
                )

    def _sources(self) -> list[Path]:
        """The file and its parts that exist."""
        parts = sorted(self.out.parent.glob(f"{_escaped(self.out.name)}.part-*"))
        return [*([self.out] if self.out.is_file() else []), *parts]

    def _lines(self) -> Iterator[Line]:
        for path in self._sources():
            for *_, line in _lines_of(path):
                yield line

    def _is_complete(self, count: int) -> bool:
        return {line["index"] for line in self._lines()} >= set(range(count))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock that writers share."""
        with self._settings.open("rb+") as file:  # a file lock on NFS needs it open for writing
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_same_rows(done: Mapping[int, str], keys: Sequence[str], label: Callable[[int], str], out: Path) -> None:
    """Raises ValueError if existing lines belong to other rows than these.

    Args:
        done: index -> key of the existing lines.
        keys: the keys of all rows.
        label: row index -> "file:line", for errors.
    """
    for index, key in sorted(done.items()):
        if index >= len(keys):
            raise ValueError(
                f"{out} has lines for {max(done) + 1} rows, but --input has {len(keys)}; use the same file (rows may be added "
                f"at its end), or another --output."
            )
        if keys[index] != key:
            raise ValueError(
                f"{label(index)} is not the row that {out} was started with at this index; use the same file (rows may be "
                f"added at its end), or another --output."
            )


def chunks(count: int, size: int) -> Iterable[range]:
    """Ranges of `size` row numbers; the last may be shorter."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _lines_of(path: Path) -> Iterator[tuple[int, int, Line]]:
    """(offset, length in bytes, value) of each complete line; a line that is still being written is skipped.

    Raises:
        ValueError: a line that was not written by this module.
    """
    start = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
                if not (isinstance(line["index"], int) and isinstance(line["key"], str)):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}:{number} is not a line of this output; remove it, or use another --output."
                ) from None
            yield start, len(text), line
            start += len(text)


def _drop_torn_line(path: Path) -> None:
    """Truncate a partial last line, which a kill during a write leaves."""
    complete = sum(length for _, length, _ in _lines_of(path))
    if complete < path.stat().st_size:
        os.truncate(path, complete)


def _escaped(name: str) -> str:
    """A file name as a glob pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
