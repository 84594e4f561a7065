"""What a run's rows say: the facts of its summary, series of a metric, seconds by phase."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from aligner.report.console import cell, format_duration
from aligner.report.metric_registry import HEADLINES, LEFT_OUT, PHASES, title_of
from aligner.report.metrics import Row


def run_summary(rows: Sequence[Row]) -> str:
    """One line: what was reached, in how many steps, how long, how fast."""
    values = dict(facts(rows))
    for name in HEADLINES:
        title = title_of(name)
        if title in values:
            lift = f" ({values['lift']})" if name == "accuracy" and "lift" in values else ""
            reached = f"{title} {values[title]}{lift}, "
            break
    else:
        reached = ""
    speed = f", {values['tokens/s (median)']} tokens/s" if "tokens/s (median)" in values else ""
    return f"{reached}{values['steps']} steps in {values['wall time']}{speed}"


def facts(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    _, accuracy = series(rows, "accuracy", keep_gaps=False)
    if accuracy:
        yield title_of("accuracy"), from_to(accuracy)
    if len(accuracy) > 1:
        yield "lift", f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points"
    _, heldout_loss = series(rows, "heldout_loss", keep_gaps=False)
    if heldout_loss:
        yield title_of("heldout_loss"), from_to(heldout_loss)
    name = main_metric(rows)
    _, values = series(rows, name, keep_gaps=False)
    if values:
        yield title_of(name), from_to(values)
    yield "steps", str(rows[-1]["step"])
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    yield "wall time", format_duration(times[-1] - times[0] + (rows[0].get("seconds") or 0) if times else 0)
    _, speed = series(rows, "tokens_per_second", keep_gaps=False)
    if speed:
        yield "tokens/s (median)", f"{median(speed):,.0f}"
    _, gap = series(rows, "gap_max", keep_gaps=False)
    if gap:
        yield "largest gap", f"{max(gap):.1e}"
    _, memory = series(rows, "memory_peak", keep_gaps=False)
    if memory:
        yield "peak memory of a rank", f"{max(memory):.2f} GiB"
    dropped = {
        name: sum(series(rows, name, keep_gaps=False)[1][-1:]) for name in ("data/left_out", "data/heldout_left_out")
    }
    if any(dropped.values()):
        yield (
            "rows of the data left out",
            f"{dropped['data/left_out']:.0f}, held out {dropped['data/heldout_left_out']:.0f}",
        )
    counts = [(name.removeprefix("reward_"), sum(series(rows, name, keep_gaps=False)[1])) for name in LEFT_OUT]
    if any(name in row for name in LEFT_OUT for row in rows):
        yield "rewards left out", ", ".join(f"{count:.0f} {name}" for name, count in counts if count) or "none"


def main_metric(rows: Sequence[Row]) -> str:
    return "reward" if any("reward" in row for row in rows) else "loss"


def from_to(values: list[float]) -> str:
    first, last = cell("", values[0]), cell("", values[-1])
    return first if len(values) == 1 else f"{first} \N{RIGHTWARDS ARROW} {last}"


def series(rows: Sequence[Row], name: str, keep_gaps: bool = True) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; a value that was not finite is a gap in the line, or left out."""
    points = [(row["step"], row[name]) for row in rows if name in row and (keep_gaps or row[name] is not None)]
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def trailing_mean(values: list[float], window: int) -> list[float]:
    tails = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    finite = [[value for value in tail if not math.isnan(value)] for tail in tails]
    return [fmean(tail) if tail else math.nan for tail in finite]


def phase_seconds(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Phase -> its seconds at each timed row, and `other`: the rest of the step. Empty where nothing was timed.

    `seconds` is the loop's iteration; the evaluation after it is not part of it, so `other` does not lack it.
    """
    rows = timed(rows)
    phases = {one.name: [float(row.get(f"seconds_{one.name}") or 0) for row in rows] for one in PHASES}
    phases = {name: values for name, values in phases.items() if any(values)}
    if not phases:
        return {}
    inside = [values for name, values in phases.items() if name != "evaluate"]
    whole = [float(row.get("seconds") or 0) for row in rows]
    # Phases on disjoint ranks overlap: their sum may be more than the step, and then nothing is left.
    other = [max(0.0, step - sum(parts[index] for parts in inside)) for index, step in enumerate(whole)]
    return {**phases, "other": other} if any(other) else phases


def timed(rows: Sequence[Row]) -> list[Row]:
    """Without rows of an evaluation alone, which would draw a step that took no time."""
    return [row for row in rows if row.get("seconds") is not None]


def sync_rate(row: Row) -> float | None:
    """GB/s of the step's weight transfer, as its ledger says; None where nothing was moved."""
    return row.get("reshard_gigabytes_per_second") or None
