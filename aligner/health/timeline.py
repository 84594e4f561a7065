"""What this rank did when: role calls and waits for other ranks, as a trace that Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from aligner.health.activity import Activity

Kind = Literal["call", "wait"]
FOLDER = "timeline"
TRANSFER, STEP_END = "transfer", "end of the step"
"""What a rank does that is no role call: it moves values; it tells the first rank what becomes a row of metrics."""


def trace_file(run_dir: str | Path, rank: int) -> Path:
    """Where a rank writes its trace."""
    return Path(run_dir) / FOLDER / f"rank{rank:05d}.json"


class Timeline:
    """Spans of one rank; nothing is kept before `open` and after the last step that is wanted.

    The file is a JSON array of trace events, an event a line. Its closing bracket may be missing, which viewers allow:
    the trace of a killed job is whole up to its last span.
    """

    def __init__(self, rank: int, activity: Activity | None = None) -> None:
        """
        Args:
            activity: is told of every span as well, whether a trace is written or not.
        """
        self.rank, self.step = rank, 0
        self.activity = activity or Activity()
        self._file: TextIO | None = None
        self._origin, self._last_step = 0.0, 0

    def open(self, run_dir: str | Path, label: str, last_step: int) -> None:
        """Start the trace. Called right after a barrier, so that the ranks' clocks have one origin.

        Args:
            label: what the viewer calls this rank.
            last_step: the last step of the loop to write.
        """
        path = trace_file(run_dir, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._origin, self._last_step = time.perf_counter(), last_step
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._write({"ph": "M", "name": "process_name", "args": {"name": label}})

    def at(self, step: int) -> None:
        """The loop is at `step` from here on; what was written is flushed."""
        self.step = step
        if self._file is None:
            return
        self._file.flush()
        if step > self._last_step:
            self.close()

    @contextmanager
    def span(self, kind: Kind, name: str, ranks: Sequence[int] = ()) -> Iterator[None]:
        """Time what runs inside: a role call, or a wait for something from `ranks`."""
        self.activity.enter(kind, name, ranks)
        traced, start = self._file is not None, time.perf_counter()
        try:
            yield
        except BaseException:
            self.activity.broke()
            raise
        finally:
            self.activity.leave()
            if traced:
                self._close_span(kind, name, ranks, start)

    def _close_span(self, kind: Kind, name: str, ranks: Sequence[int], start: float) -> None:
        args: dict[str, Any] = {"step": self.step}
        if ranks:
            args["ranks"] = list(ranks)
        end = time.perf_counter()
        times = {"ts": round((start - self._origin) * 1e6, 1), "dur": round((end - start) * 1e6, 1)}
        self._write({"ph": "X", "name": name, "cat": kind, **times, "args": args})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is not None:  # a span may outlive the trace
            self._file.write(json.dumps({**event, "pid": self.rank, "tid": 0}) + ",\n")

    def close(self) -> None:
        """End the file, as strict JSON."""
        if self._file is not None:
            end = json.dumps(
                {"ph": "M", "name": "process_sort_index", "pid": self.rank, "args": {"sort_index": self.rank}}
            )
            self._file.write(end + "\n]\n")
            self._file.close()
            self._file = None
