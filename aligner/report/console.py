"""The console: one aligned table row a step and, on a terminal, a progress bar below it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TextIO

from aligner.report.metric_registry import LEFT_OUT, METRICS, Metric, metric_of

PLAIN_WIDTH = 120  # a log file is read in windows of every width; this is the common one
HEADER_EVERY = 20  # rows between repeated headers, about one screen
BAR_WIDTH = 28


@dataclass(frozen=True)
class TableColumn:
    """A column of the table and the metric that it shows."""

    metric: str
    title: str
    width: int
    """Characters."""
    drop: int = 0
    """On a narrow terminal the highest is dropped first; 0 never is."""


def _table(kind: str) -> tuple[TableColumn, ...]:
    """The table `rollout` or `supervised`, as its columns are declared."""
    declared = [(metric.name, column) for metric in METRICS if (column := getattr(metric, kind)) is not None]
    declared.sort(key=lambda pair: pair[1].place)
    return tuple(TableColumn(name, column.title or name, column.width, column.drop) for name, column in declared)


ROLLOUT_TABLE = _table("rollout")
# Loops that sample nothing (supervised, preferences): the columns whose metrics the row has, in this order.
SUPERVISED_TABLE = _table("supervised")


def columns_for(metrics: Collection[str]) -> tuple[TableColumn, ...]:
    """The table for these metrics: rollouts where there is a reward (or only an evaluation), else supervised."""
    own = tuple(TableColumn(name, name, max(8, len(name)), 12) for name in metrics if _has_own_column(metric_of(name)))
    if "reward" in metrics or "loss" not in metrics:
        return ROLLOUT_TABLE + own
    return tuple(column for column in SUPERVISED_TABLE if column.metric in {"step", *metrics}) + own


def _has_own_column(metric: Metric | None) -> bool:
    """A metric that is not declared is one of a user's loop, and shown."""
    return metric is None or metric.own_column


def columns_that_fit(columns: tuple[TableColumn, ...], width: int) -> tuple[TableColumn, ...]:
    """The columns that stand side by side in `width` characters, the highest `drop` dropped first."""
    kept = list(columns)
    while sum(column.width for column in kept) + 2 * (len(kept) - 1) > width:
        first = max(kept, key=lambda column: (column.drop, kept.index(column)))
        if first.drop == 0:
            break
        kept.remove(first)
    return tuple(kept)


def cell(metric: str, value: object) -> str:
    """A value as its metric is read; "-" where there is none, "nan" where there is one and it is not a number."""
    if value is None or isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if not math.isfinite(value):
        return str(float(value))
    declared = metric_of(metric)
    form = "number" if declared is None else declared.format
    if form == "count":
        return f"{value:.0f}"
    if form == "rate":
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    if form == "seconds":
        return f"{value:.{3 if abs(value) < 10 else 1}f}" if abs(value) < 1000 else f"{value:.0f}"
    if form == "gigabytes":
        return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
    if form == "scientific":
        return f"{value:.1e}"
    if form == "tenths":
        return f"{value:.1f}"
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.{4 if 0 < abs(value) < 0.1 else 3 if abs(value) < 100 else 1}f}"
    return f"{value:.1e}" if abs(value) < 0.001 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 3:04:05."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def progress(done: int, total: int, elapsed: float, steps_here: int, width: int) -> str:
    """The bar's line. `steps_here` of the `done` steps were taken in `elapsed` seconds (a resumed run took fewer)."""
    share = min(1.0, done / total)
    filled = round(share * BAR_WIDTH)
    left = f", {format_duration(elapsed / steps_here * (total - done))} left" if steps_here > 0 and done < total else ""
    text = f"[{'=' * filled}{' ' * (BAR_WIDTH - filled)}] step {done}/{total}  {share:4.0%}  {format_duration(elapsed)}{left}"
    return text[: width - 1]  # a full last column would wrap


class Console:
    """Prints rows. On a terminal the bar is redrawn in place; elsewhere no control character is ever written."""

    def __init__(self, total_steps: int | None = None, stream: TextIO | None = None, every: int = 1) -> None:
        self._every = every
        self._stream = stream if stream is not None else sys.stdout
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._step = 0
        self._seen: dict[str, None] = {}
        self._columns: tuple[TableColumn, ...] = ()
        self._rows = 0
        self._hidden_reported = False
        self._lost = False

    def row(self, step: int, row: Mapping[str, object]) -> None:
        """Print one step. The metrics seen so far choose the columns; a row of the other kind starts a new table."""
        is_training = "reward" in row or "loss" in row
        if is_training and ("reward" in row) != ("reward" in self._seen):
            self._seen = {}
        self._seen.update(dict.fromkeys(row))
        if step > 0 and self._first_step is None:
            self._first_step = step
        self._step = step
        if not (step % self._every == 0 or step in (1, self._total_steps) or "seconds_evaluate" in row):
            self._print([])
            return

        table = columns_for(self._seen)
        columns = columns_that_fit(table, self._width())
        lines = []
        if columns != self._columns or self._rows % HEADER_EVERY == 0:
            lines += self._header(table, columns)
            self._columns, self._rows = columns, 0
        self._rows += 1
        values = {**row, "step": step}
        lines.append("  ".join(cell(one.metric, values.get(one.metric)).rjust(one.width) for one in columns))
        self._print([*lines, *self._left_out(row)])

    def note(self, text: str) -> None:
        """Print a line of text above the bar."""
        self._print([text])

    def close(self) -> None:
        """Leave the bar where it stands and end its line."""
        if self._live and self._total_steps:
            self._write("\n")
        self._live = False

    def _header(self, table: tuple[TableColumn, ...], columns: tuple[TableColumn, ...]) -> list[str]:
        titles = "  ".join(one.title.rjust(one.width) for one in columns)
        lines = ["", titles, "  ".join("-" * one.width for one in columns)]
        hidden = [one.title for one in table if one not in columns]
        if hidden and not self._hidden_reported:
            self._hidden_reported = True
            lines.insert(0, f"(not shown at this width, but in metrics.jsonl: {', '.join(hidden)})")
        return lines

    def _left_out(self, row: Mapping[str, object]) -> list[str]:
        """A failed reward is not a zero: say so under its row."""
        counts = [(name.removeprefix("reward_"), row.get(name)) for name in LEFT_OUT]
        parts = [f"{count:.0f} {name}" for name, count in counts if isinstance(count, (int, float)) and count > 0]
        return [f"       ! rewards left out of the advantages: {', '.join(parts)}"] if parts else []

    def _width(self) -> int:
        if not self._live:
            return PLAIN_WIDTH
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or PLAIN_WIDTH
        except OSError:
            return PLAIN_WIDTH

    def _print(self, lines: list[str]) -> None:
        text = "".join(line + "\n" for line in lines)
        if self._live:
            text = f"\r\x1b[K{text}{self._bar()}"
        self._write(text)

    def _bar(self) -> str:
        if not self._total_steps:
            return ""
        steps_here = 0 if self._first_step is None else self._step - self._first_step + 1
        return progress(self._step, self._total_steps, time.monotonic() - self._started, steps_here, self._width())

    def _write(self, text: str) -> None:
        if self._lost:
            return
        try:
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except OSError:
            # A pipe's reader went away (`| head`, a closed ssh line): the training goes on, metrics.jsonl has all.
            self._lost = True
