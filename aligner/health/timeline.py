"""Timeline of this rank's role calls and waits, in the Chrome trace format (Perfetto, chrome://tracing)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from aligner.health.activity import Activity

Kind = Literal["call", "wait"]
FOLDER = "timeline"
TRANSFER, STEP_END = "transfer", "end of the step"
"""Names of spans that are not role calls: moving values between roles, and sending the step's metrics to rank 0."""


HOST, DEVICE_LAUNCHES = 0, 1
"""Rows of a rank in the trace: what it did; on a GPU, what it launched, by the host's clock."""


class Marks(Protocol):
    """A clock of the device that computes (`aligner.spmd.device_clock.DeviceClock`)."""

    def mark(self) -> Any:
        """A moment of the work launched so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two of them; waits for the second."""


def trace_file(run_dir: str | Path, rank: int) -> Path:
    """The trace file of a rank."""
    return Path(run_dir) / FOLDER / f"rank{rank:05d}.json"


class Timeline:
    """Records spans of one rank, between `open` and the last traced step.

    The file is a JSON array of trace events, one per line. Its closing bracket may be missing, which viewers accept, so
    the trace of a killed job is complete up to its last span.
    """

    def __init__(self, rank: int, activity: Activity | None = None, marks: Marks | None = None) -> None:
        """
        Args:
            activity: also updated by every span, whether a trace is written or not.
            marks: of a device that computes while the host goes on. Spans are then those of the device's work, written at the
                end of each step; the host's, written at once, are a row of their own.
        """
        self.rank, self.step = rank, 0
        self.activity = activity or Activity()
        self._file: TextIO | None = None
        self._origin, self._last_step = 0.0, 0
        self._marks, self._origin_mark = marks, None
        self._marked: list[tuple[dict[str, Any], Any, Any]] = []
        """Events whose times the device has yet to tell, with their marks."""

    def open(self, run_dir: str | Path, label: str, last_step: int) -> None:
        """Start the trace. Called right after a barrier, so that the ranks' clocks have a common origin.

        Args:
            label: name of this rank in the viewer.
            last_step: the last training step to trace.
        """
        path = trace_file(run_dir, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._origin, self._last_step = time.perf_counter(), last_step
        self._origin_mark = self._marks.mark() if self._marks else None
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._write({"ph": "M", "name": "process_name", "args": {"name": label}})

    def at(self, step: int) -> None:
        """Set the current training step and flush the file; closes it after the last traced step."""
        self.step = step
        if self._file is None:
            return
        self._write_marked()
        self._file.flush()
        if step > self._last_step:
            self.close()

    @contextmanager
    def span(self, kind: Kind, name: str, ranks: Sequence[int] = ()) -> Iterator[None]:
        """Context manager that records a role call, or a wait for `ranks`."""
        self.activity.enter(kind, name, ranks)
        traced, start = self._file is not None, time.perf_counter()
        mark = self._marks.mark() if self._marks and traced else None
        try:
            yield
        except BaseException:
            self.activity.record_exception()
            mark = None  # a device that has failed takes no marks: their error would hide this one
            raise
        finally:
            self.activity.leave()
            if traced:
                self._close_span(kind, name, ranks, start, mark)

    def _close_span(self, kind: Kind, name: str, ranks: Sequence[int], start: float, mark: Any) -> None:
        args: dict[str, Any] = {"step": self.step}
        if ranks:
            args["ranks"] = list(ranks)
        end = time.perf_counter()
        event = {"ph": "X", "name": name, "cat": kind, "args": args}
        if self._marks and mark is not None:
            self._marked.append((event, mark, self._marks.mark()))
        row = DEVICE_LAUNCHES if self._marks else HOST
        self._write({**event, **_times(start - self._origin, end - start)}, row)

    def _write_marked(self) -> None:
        marked, self._marked = self._marked, []
        for event, start, end in marked:
            assert self._marks is not None
            seconds = self._marks.seconds(start, end)
            self._write({**event, **_times(self._marks.seconds(self._origin_mark, start), seconds)})

    def _write(self, event: dict[str, Any], row: int = HOST) -> None:
        if self._file is not None:  # a span may outlive the trace
            self._file.write(json.dumps({**event, "pid": self.rank, "tid": row}) + ",\n")

    def close(self) -> None:
        """Complete the file as strict JSON."""
        if self._file is not None:
            self._write_marked()
            end = json.dumps(
                {"ph": "M", "name": "process_sort_index", "pid": self.rank, "args": {"sort_index": self.rank}}
            )
            self._file.write(end + "\n]\n")
            self._file.close()
            self._file = None


def _times(start: float, duration: float) -> dict[str, float]:
    """Seconds -> a trace event's microseconds."""
    return {"ts": round(start * 1e6, 1), "dur": round(duration * 1e6, 1)}
