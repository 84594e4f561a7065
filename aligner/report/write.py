"""The report of a run: its learning curve as a PNG and one HTML page; or several runs' curves in one PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from aligner.report.figures import LIGHT, comparison, learning_curve, png, styled
from aligner.report.gantt import gantt, lines
from aligner.report.html import page
from aligner.report.metrics import read_metrics
from aligner.report.statistics import run_summary, series
from aligner.report.traces import merge, read_spans, whole_steps

PNG_FILE = "learning_curve.png"
HTML_FILE = "report.html"


def write_report(run_dir: str | Path, out_dir: str | Path | None = None) -> tuple[Path, Path]:
    """Write learning_curve.png and report.html from a run's files; by default into the run's folder.

    Raises:
        ValueError: the folder has no metrics (see `read_metrics`).
    """
    run_dir = Path(run_dir).resolve()
    rows = read_metrics(run_dir)
    out = run_dir if out_dir is None else Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with styled(LIGHT):
        picture = png(learning_curve(rows, LIGHT, f"{run_dir.name}: {run_summary(rows)}"))
    return _write(out / PNG_FILE, picture), _write(out / HTML_FILE, page(run_dir, rows).encode())


def compare_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw several runs' curves (seeds of one job, say) into one PNG: held-out accuracy, else reward, else loss.

    Raises:
        ValueError: a folder has no metrics, the runs share none of these, or `out` is not a .png.
    """
    out = Path(out)
    if out.suffix != ".png":
        raise ValueError(f"out={str(out)!r} must end in .png to compare runs.")
    folders = [Path(run_dir).resolve() for run_dir in run_dirs]
    unique = len({folder.name for folder in folders}) == len(folders)
    runs = {
        folder.name if unique else f"{folder.parent.name}/{folder.name}": read_metrics(folder) for folder in folders
    }
    shared = [name for name in ("accuracy", "reward", "loss") if all(series(rows, name)[0] for rows in runs.values())]
    if not shared:
        raise ValueError(
            f"the runs {', '.join(runs)} share none of accuracy, reward and loss; compare runs of one kind."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with styled(LIGHT):
        return _write(out, png(comparison(runs, shared[:2])))


def write_timeline(
    run_dir: str | Path, step: int | None = None, out_dir: str | Path | None = None
) -> tuple[Path, Path]:
    """Write timeline.json, all ranks for Perfetto, and timeline.png: one step, by default the last that was traced.

    Raises:
        ValueError: the run has no timelines, or none of this step.
    """
    spans = read_spans(run_dir)
    steps = whole_steps(spans)
    if not steps or step not in (None, *steps):
        there = f"use one of {', '.join(map(str, steps))}" if steps else "no step of it is whole"
        raise ValueError(f"{run_dir} has no timeline of step {step}; {there} (logging.timeline_steps sets how many).")
    chosen = steps[-1] if step is None else step
    of_step = [span for span in spans if span.step == chosen]
    out = Path(run_dir) if out_dir is None else Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with styled(LIGHT):
        picture = _write(out / "timeline.png", png(gantt(of_step, LIGHT, chosen)))
    print("\n".join(lines(of_step)))
    return merge(run_dir, out / "timeline.json"), picture


def _write(path: Path, content: bytes) -> Path:
    """All of the file or the one before it: a page that is open in a browser is never half a page."""
    half_written = path.with_name(path.name + ".tmp")
    half_written.write_bytes(content)
    os.replace(half_written, path)
    return path
