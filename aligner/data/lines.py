"""Answers on disk, one JSON line for each row, that survive a kill at any moment: parts that only grow, then one file.

    out.jsonl.settings.json   what decides the answers, written first
    out.jsonl.part-0          the lines of one writer, in the order of their writing
    out.jsonl                 all lines in the order of the rows; appears when the last is there, and the parts go

A line has "index" (the row's number) and "key" (a digest of the row's prompt). Several writers, each with a part of its
own, may work for one file.
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


class Lines:
    """One writer's view of the file `out`; a context manager. See the module."""

    done: dict[int, str]
    """Index -> key of each line that there was at the start, in any part."""

    def __init__(self, out: str | Path, settings: Mapping[str, Any], part: int = 0) -> None:
        """Go on where an earlier run stopped, or begin.

        Args:
            settings: option -> value, as JSON holds it; those of an earlier run must be equal.
            part: this writer's number among those that work at the same time.

        Raises:
            ValueError: the file was begun with other settings, holds something else, or is being written.
        """
        self.out = Path(out)
        self._settings = self.out.with_name(f"{self.out.name}.settings.json")
        self._check(json.loads(json.dumps(settings)))
        self._path = self.out.with_name(f"{self.out.name}.part-{part}")
        self._file: BinaryIO = self._path.open("ab")
        try:
            self._own()
            with self._alone():  # another writer may be merging what there is
                _drop_torn_line(self._path)
                self.done = {line["index"]: line["key"] for line in self._lines()}
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines; they are on the disk when this returns."""
        # json leaves half of a surrogate pair as it is, which UTF-8 cannot hold; its escape is what JSON has for it
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def merge(self, count: int) -> bool:
        """Make the parts one file, if they hold all of `count` rows by now; the last writer to call this does it.

        Returns:
            Whether the file is whole.
        """
        with self._alone():
            parts = [path for path in self._sources() if path != self.out]
            if all(path == self._path and not path.stat().st_size for path in parts) and self.out.is_file():
                return self._whole(count)  # nothing new
            if not self._whole(count):
                return False
            places: dict[int, tuple[Path, int, int]] = {}
            for path in self._sources():
                for start, length, line in _lines_of(path):
                    places.setdefault(line["index"], (path, start, length))
            unnamed = self.out.with_name(f".{self.out.name}.merging")
            files = {path: path.open("rb") for path in self._sources()}
            try:
                with unnamed.open("wb") as merged:
                    for _, (path, start, length) in sorted(places.items()):
                        files[path].seek(start)
                        merged.write(files[path].read(length))
                    merged.flush()
                    os.fsync(merged.fileno())
                os.replace(unnamed, self.out)
            finally:
                for file in files.values():
                    file.close()
                unnamed.unlink(missing_ok=True)
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

    def _own(self) -> None:
        """Nobody else writes this part."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self._path} is being written by another process; wait for it, or end it.") from None
        except OSError:
            pass  # a file system without locks

    def _check(self, settings: dict[str, Any]) -> None:
        remedy = f"give another --output, or remove {self.out}*"
        if not self._settings.is_file():
            if self.out.exists():
                raise ValueError(f"--output {self.out} exists and has no {self._settings.name} beside it; {remedy}.")
            if not self.out.absolute().parent.is_dir():
                raise ValueError(
                    f"--output {self.out}: there is no folder {self.out.absolute().parent}; make it first."
                )
            unnamed = self.out.with_name(f".{self._settings.name}.{os.getpid()}")
            unnamed.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            os.replace(unnamed, self._settings)
            return
        try:
            before = dict(json.loads(self._settings.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{self._settings} is not valid; {remedy}.") from None
        for name in settings | before:
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{name} is {_shown(settings.get(name))} here, and {_shown(before.get(name))} in what {self.out} was "
                    f"begun with; give the same, or {remedy}."
                )

    def _sources(self) -> list[Path]:
        """The file and its parts, as far as they are there."""
        parts = sorted(self.out.parent.glob(f"{_escaped(self.out.name)}.part-*"))
        return [*([self.out] if self.out.is_file() else []), *parts]

    def _lines(self) -> Iterator[Line]:
        for path in self._sources():
            for *_, line in _lines_of(path):
                yield line

    def _whole(self, count: int) -> bool:
        return {line["index"] for line in self._lines()} >= set(range(count))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time."""
        with self._settings.open("rb+") as file:  # a file lock on NFS needs it open for writing
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_rows(done: Mapping[int, str], keys: Sequence[str], label: Callable[[int], str], out: Path) -> None:
    """ValueError where lines answer other rows than these.

    Args:
        keys: of every row.
        label: where a row stands.
    """
    for index, key in sorted(done.items()):
        if index >= len(keys):
            raise ValueError(
                f"{out} answers {max(done) + 1} rows, and --input has {len(keys)}; give the same file (rows may be added "
                f"at its end), or another --output."
            )
        if keys[index] != key:
            raise ValueError(
                f"{label(index)} is not the row that {out} was begun with at this place; give the same file (rows may be "
                f"added at its end), or another --output."
            )


def chunks(count: int, size: int) -> Iterable[range]:
    """Row numbers by `size`; the last are fewer."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _lines_of(path: Path) -> Iterator[tuple[int, int, Line]]:
    """(offset, bytes, value) of each whole line; what another writer has written half of is not seen yet.

    Raises:
        ValueError: a line that this module has not written.
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
                    f"{path}:{number} is no line of answers; remove it, or give another --output."
                ) from None
            yield start, len(text), line
            start += len(text)


def _drop_torn_line(path: Path) -> None:
    """A kill in the middle of a write leaves half a line."""
    whole = sum(length for _, length, _ in _lines_of(path))
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _escaped(name: str) -> str:
    """A file's name as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
