"""The report of a run: its learning curve as a PNG and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, cast

from aligner.driver.console import LEFT_OUT, PHASES, cell, columns_for, duration
from aligner.driver.metrics import CONFIG_FILE, ENVIRONMENT_FILE, Row, read_metrics
from aligner.driver.samples import sample_files

if TYPE_CHECKING:  # matplotlib takes half a second and is wanted once, at the end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_FILE = "learning_curve.png"
HTML_FILE = "report.html"
LAST_ROWS = 12
EXCERPT = 3000  # characters of a samples file
BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY = (
    "#3b7dc4", "#e07b39", "#3f9e6e", "#8b6fc0", "#c8504b", "#37a3a3", "#8a8f98",
)  # fmt: skip
PHASE_COLORS = dict(zip((*PHASES, "other"), (BLUE, PURPLE, TEAL, ORANGE, GREEN, RED, GREY), strict=True))
RUN_COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL)
# Small panels in this order; the first six that the run has are drawn.
PANELS = {
    "entropy": "entropy (nats)",
    "kl": "KL to the reference",
    "length": "response length (tokens)",
    "gap_max": "largest log-probability gap",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens/s",
    "truncated": "truncated share",
}
LOG_SCALE = {"gap_max"}


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering of the figures; the page shows the one that the reader's system prefers."""

    background: str
    ink: str
    grid: str


LIGHT = Theme("#ffffff", "#1f2430", "#e4e7ec")
DARK = Theme("#171b22", "#d7dbe2", "#2c323d")


def write_report(run_dir: str | Path, out_dir: str | Path | None = None) -> tuple[Path, Path]:
    """Write learning_curve.png and report.html from a run's files; by default into the run's folder.

    Raises:
        ValueError: the folder has no metrics (see `read_metrics`).
    """
    run_dir = Path(run_dir).resolve()
    rows = read_metrics(run_dir)
    out = run_dir if out_dir is None else Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with _styled(LIGHT):
        picture = _png(_learning_curve(rows, LIGHT, f"{run_dir.name}: {summary(rows)}"))
    return _write(out / PNG_FILE, picture), _write(out / HTML_FILE, _page(run_dir, rows).encode())


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
    shared = [name for name in ("accuracy", "reward", "loss") if all(_series(rows, name)[0] for rows in runs.values())]
    if not shared:
        raise ValueError(
            f"the runs {', '.join(runs)} share none of accuracy, reward and loss; compare runs of one kind."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with _styled(LIGHT):
        return _write(out, _png(_comparison(runs, shared[:2])))


def summary(rows: Sequence[Row]) -> str:
    """One line: what was reached, in how many steps, how long, how fast."""
    facts = dict(_facts(rows))
    for name, title in (("accuracy", "held-out accuracy"), ("reward", "reward"), ("loss", "loss")):
        if title in facts:
            lift = f" ({facts['lift']})" if name == "accuracy" and "lift" in facts else ""
            reached = f"{title} {facts[title]}{lift}, "
            break
    else:
        reached = ""
    speed = f", {facts['tokens/s (median)']} tokens/s" if "tokens/s (median)" in facts else ""
    return f"{reached}{facts['steps']} steps in {facts['wall time']}{speed}"


def _facts(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    _, accuracy = _series(rows, "accuracy", keep_gaps=False)
    if accuracy:
        yield "held-out accuracy", _from_to(accuracy)
    if len(accuracy) > 1:
        yield "lift", f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points"
    name = _main_metric(rows)
    _, values = _series(rows, name, keep_gaps=False)
    if values:
        yield name, _from_to(values)
    yield "steps", str(rows[-1]["step"])
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    yield "wall time", duration(times[-1] - times[0] + (rows[0].get("seconds") or 0) if times else 0)
    _, speed = _series(rows, "tokens_per_second", keep_gaps=False)
    if speed:
        yield "tokens/s (median)", f"{median(speed):,.0f}"
    _, gap = _series(rows, "gap_max", keep_gaps=False)
    if gap:
        yield "largest gap", f"{max(gap):.1e}"
    counts = [(name.removeprefix("reward_"), sum(_series(rows, name, keep_gaps=False)[1])) for name in LEFT_OUT]
    if any(name in row for name in LEFT_OUT for row in rows):
        yield "rewards left out", ", ".join(f"{count:.0f} {name}" for name, count in counts if count) or "none"


def _main_metric(rows: Sequence[Row]) -> str:
    return "reward" if any("reward" in row for row in rows) else "loss"


def _from_to(values: list[float]) -> str:
    first, last = cell("", values[0]), cell("", values[-1])
    return first if len(values) == 1 else f"{first} \N{RIGHTWARDS ARROW} {last}"


def _series(rows: Sequence[Row], name: str, keep_gaps: bool = True) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; a value that was not finite is a gap in the line, or left out."""
    points = [(row["step"], row[name]) for row in rows if name in row and (keep_gaps or row[name] is not None)]
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def _trailing_mean(values: list[float], window: int) -> list[float]:
    tails = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    finite = [[value for value in tail if not math.isnan(value)] for tail in tails]
    return [fmean(tail) if tail else math.nan for tail in finite]


# Figures, by the object interface of matplotlib: pyplot keeps figures and a backend for the whole process.


@contextmanager
def _styled(theme: Theme) -> Iterator[None]:
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: dict[str, Any] = {name: theme.ink for name in ink}
    style |= {"figure.facecolor": theme.background, "axes.facecolor": theme.background, "savefig.dpi": 130}
    style |= {"axes.edgecolor": theme.grid, "grid.color": theme.grid, "axes.grid": True, "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}
    style |= {"legend.frameon": False, "lines.linewidth": 1.6, "axes.titlelocation": "left", "axes.titlepad": 8}
    with matplotlib.rc_context(cast(Any, style)):
        yield


def _grid(columns: int, rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.set_xlabel("step")
    return figure, axes


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _learning_curve(rows: Sequence[Row], theme: Theme, title: str | None = None) -> Figure:
    figure, (ax,) = _grid(1, 1, 9.6, 4.4)
    name = _main_metric(rows)
    _noisy_line(ax, *_series(rows, name), BLUE, f"train {name}")
    steps, accuracy = _series(rows, "accuracy", keep_gaps=False)
    if accuracy:
        # A loss and an accuracy share no scale; a reward of rules does, and the reader compares the two.
        beside = ax if name == "reward" else ax.twinx()
        beside.plot(steps, accuracy, "o-", color=ORANGE, markersize=5, label="held-out accuracy")
        if beside is not ax:
            beside.set_ylim(0, 1.05)
            beside.grid(visible=False)
            beside.set_ylabel("held-out accuracy")
        for index in {0, len(steps) - 1}:
            text, point, offset = f"{accuracy[index]:.3f}", (steps[index], accuracy[index]), (0, 8 if index else -15)
            bold = {"ha": "center", "color": ORANGE, "fontweight": "bold"}
            beside.annotate(text, point, xytext=offset, textcoords="offset points", **cast(Any, bold))
    ax.set_ylabel(name if name == "loss" or not accuracy else "reward, accuracy")
    ax.margins(y=0.12)
    handles = [line for one in figure.axes for line in one.get_lines() if not str(line.get_label()).startswith("_")]
    if handles:
        ax.legend(handles=handles, loc="best")
    if title:
        ax.set_title(title, color=theme.ink, fontsize=9.5)
    return figure


def _noisy_line(ax: Axes, steps: list[int], values: list[float], color: str, label: str) -> None:
    """The line itself, faint below its trailing mean where it is long enough to need one."""
    window = max(1, len(values) // 12)
    if window < 2:
        ax.plot(steps, values, ".-" if len(values) < 30 else "-", color=color, label=label)
        return
    ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    ax.plot(steps, _trailing_mean(values, window), color=color, label=f"{label} (mean of {window})")


def _panels(rows: Sequence[Row], _theme: Theme) -> Figure | None:
    drawn_above = _main_metric(rows)
    present = [name for name in PANELS if name != drawn_above and _series(rows, name, keep_gaps=False)[0]][:6]
    if not present:
        return None
    figure, axes = _grid(3, math.ceil(len(present) / 3), 9.6, 2.2 * math.ceil(len(present) / 3))
    for ax, name in zip(axes, present, strict=False):
        steps, values = _series(rows, name)
        if name in LOG_SCALE and any(value > 0 for value in values):
            values = [value if value > 0 else math.nan for value in values]
            ax.set_yscale("log")
            powers = [math.log10(value) for value in values if not math.isnan(value)]
            ax.set_ylim(10 ** math.floor(min(powers)), 10 ** (math.floor(max(powers)) + 1))  # whole decades
        ax.plot(steps, values, ".-" if len(values) < 30 else "-", color=BLUE, linewidth=1.3)
        ax.set_title(PANELS[name] + (" (log)" if name in LOG_SCALE else ""))
    for ax in axes[len(present) :]:
        ax.set_visible(False)
    return figure


def _phases(rows: Sequence[Row], theme: Theme) -> Figure | None:
    seconds = phase_seconds(rows)
    if not seconds:
        return None
    steps = [row["step"] for row in _timed(rows)]
    figure, (ax,) = _grid(1, 1, 9.6, 3.2)
    # One row has no area: half a step to either side gives it one.
    x = steps if len(steps) > 1 else [steps[0] - 0.5, steps[0] + 0.5]
    layers = [values if len(steps) > 1 else values * 2 for values in seconds.values()]
    colors = [PHASE_COLORS[name] for name in seconds]
    ax.stackplot(x, layers, labels=list(seconds), colors=colors, alpha=0.85, edgecolor=theme.background, linewidth=0.3)
    ax.set_ylabel("seconds a step")
    ax.margins(x=0)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))  # as they are stacked
    return figure


def phase_seconds(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Phase -> its seconds at each timed row, and `other`: the rest of the step. Empty where nothing was timed.

    `seconds` is the loop's iteration; the evaluation after it is not part of it, so `other` does not lack it.
    """
    rows = _timed(rows)
    phases = {name: [float(row.get(f"seconds_{name}") or 0) for row in rows] for name in PHASES}
    phases = {name: values for name, values in phases.items() if any(values)}
    if not phases:
        return {}
    inside = [values for name, values in phases.items() if name != "evaluate"]
    whole = [float(row.get("seconds") or 0) for row in rows]
    # Phases on disjoint ranks overlap: their sum may be more than the step, and then nothing is left.
    other = [max(0.0, step - sum(parts[index] for parts in inside)) for index, step in enumerate(whole)]
    return {**phases, "other": other} if any(other) else phases


def _timed(rows: Sequence[Row]) -> list[Row]:
    """Without rows of an evaluation alone, which would draw a step that took no time."""
    return [row for row in rows if row.get("seconds") is not None]


def _ledger(rows: Sequence[Row], _theme: Theme) -> Figure | None:
    steps, moved = _series(rows, "reshard_moved_bytes", keep_gaps=False)
    minimum_steps, minimum = _series(rows, "reshard_minimum_bytes", keep_gaps=False)
    if not any(moved):
        return None
    figure, (left, right) = _grid(2, 1, 9.6, 2.5)
    left.plot(steps, [value / 1e6 for value in moved], color=BLUE, linewidth=3, alpha=0.5, label="moved")
    left.plot(minimum_steps, [value / 1e6 for value in minimum], "--", color=ORANGE, label="minimum")
    left.set_ylim(bottom=0, top=1.3 * max(moved) / 1e6)
    left.set_title("MB a sync")
    left.legend(loc="lower right")
    rate = [(row["step"], value) for row in rows if (value := _rate(row)) is not None]
    right.plot([step for step, _ in rate], [value for _, value in rate], color=GREEN, linewidth=1.3)
    right.set_ylim(bottom=0)
    right.set_title("GB/s, the whole sync")
    return figure


def _rate(row: Row) -> float | None:
    moved, seconds = row.get("reshard_moved_bytes"), row.get("seconds_reshard")
    return moved / seconds / 1e9 if moved and seconds else None


def _comparison(runs: dict[str, list[Row]], metrics: Sequence[str]) -> Figure:
    figure, axes = _grid(len(metrics), 1, 5.6 * len(metrics) + 0.6, 4.4)
    ends = {}
    for index, (label, rows) in enumerate(runs.items()):
        color = RUN_COLORS[index % len(RUN_COLORS)]
        style = ("-", "--", ":")[index // len(RUN_COLORS) % 3]
        for ax, name in zip(axes, metrics, strict=True):
            steps, values = _series(rows, name, keep_gaps=False)
            if ax is axes[0]:
                ends[label] = values
                label_ends = f"{label}: {_from_to(values)}"
                ax.plot(steps, values, f"o{style}", color=color, markersize=3.5, label=label_ends)
            else:
                ax.plot(steps, _trailing_mean(values, max(1, len(values) // 12)), style, color=color, linewidth=1.3)
    titles = {"accuracy": "held-out accuracy", "reward": "train reward", "loss": "train loss"}
    for ax, name in zip(axes, metrics, strict=True):
        ax.set_title(titles[name] + ("" if ax is axes[0] else " (trailing mean)"))
    axes[0].legend(loc="best", fontsize=8)
    lifts = sorted(values[-1] - values[0] for values in ends.values())
    scale, unit = (100, " points") if metrics[0] == "accuracy" else (1, "")
    low, middle, high = (f"{scale * lift:+.3g}" for lift in (lifts[0], median(lifts), lifts[-1]))
    figure.suptitle(f"{len(runs)} runs, {titles[metrics[0]]}: {low} to {high}{unit} (median {middle})", fontsize=11)
    return figure


# The page.

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1f2430;--soft:#667085;--line:#e4e7ec}
@media(prefers-color-scheme:dark){:root{--bg:#0f1217;--card:#171b22;--ink:#d7dbe2;--soft:#8d96a5;--line:#2c323d}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 60px}h1{font-size:26px;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 12px}p{margin:0 0 10px}.soft{color:var(--soft)}.lead{font-size:16px;margin:6px 0 20px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:16px 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:12px;margin:0 0 16px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.facts dt{color:var(--soft);font-size:12px}.facts dd{margin:2px 0 0;font-size:16px;font-weight:600}
img{width:100%;height:auto;display:block}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{padding:4px 12px 4px 0;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}pre{font:12.5px/1.5 ui-monospace,monospace;margin:8px 0 0;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:460px;overflow:auto}summary{cursor:pointer;font-weight:600}
""".strip()


def _page(run_dir: Path, rows: list[Row]) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(rows))
    ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(rows[-1].get("time") or 0))
    parts = [
        _section("Learning curve", _picture(_learning_curve, rows, "learning curve")),
        _section("How it went", _picture(_panels, rows, "metrics by step")),
        _section("Seconds by phase", _picture(_phases, rows, "seconds by phase") + _phase_table(rows)),
        _section("Resharding", _ledger_text(rows) + _picture(_ledger, rows, "bytes and rate of each sync")),
        _section(f"Last {min(len(rows), LAST_ROWS)} rows", _rows_table(rows)),
        _section("Samples", _samples(run_dir)),
        _section("Environment", _environment(run_dir / ENVIRONMENT_FILE)),
        _configuration(run_dir / CONFIG_FILE),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run_dir.name)} \N{MIDDLE DOT} aligner</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(run_dir.name)}</h1><p class="lead soft">{escape(summary(rows))}; last row {ended}</p>'
        f'<dl class="facts">{facts}</dl>{"".join(parts)}</main></body></html>\n'
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _picture(draw: Callable[[Sequence[Row], Theme], Figure | None], rows: Sequence[Row], text: str) -> str:
    """The figure in both themes, inside the page; the browser shows one."""
    sources = []
    for theme in (LIGHT, DARK):
        with _styled(theme):
            figure = draw(rows, theme)
            if figure is None:
                return ""
            sources.append(f"data:image/png;base64,{base64.b64encode(_png(figure)).decode()}")
    dark = f'<source media="(prefers-color-scheme:dark)" srcset="{sources[1]}">'
    return f'<picture>{dark}<img alt="{escape(text)}" src="{sources[0]}"></picture>'


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _rows_table(rows: Sequence[Row]) -> str:
    columns = columns_for({name: None for row in rows for name in row})
    lines = [[cell(column.metric, row.get(column.metric)) for column in columns] for row in rows[-LAST_ROWS:]]
    return _table([column.title for column in columns], lines)


def _phase_table(rows: Sequence[Row]) -> str:
    totals = {name: (sum(values), median(values)) for name, values in phase_seconds(rows).items()}
    whole = sum(total for total, _ in totals.values())
    lines = [[name, f"{all_:.2f}", f"{one:.3f}", f"{all_ / whole:.1%}"] for name, (all_, one) in totals.items()]
    return _table(["phase", "seconds", "median a step", "share"], lines) if totals else ""


def _ledger_text(rows: Sequence[Row]) -> str:
    syncs = [row for row in rows if row.get("reshard_moved_bytes") is not None]
    if not syncs:
        return ""
    moved, least = (sum(row.get(f"reshard_{name}_bytes") or 0 for row in syncs) for name in ("moved", "minimum"))
    times = [row["seconds_reshard"] for row in syncs if row.get("seconds_reshard")]
    rates = [rate for row in syncs if (rate := _rate(row)) is not None]
    beside = "the computed minimum" if moved == least else f"{moved / least:.3f} times the minimum of {_bytes(least)}"
    if not least:
        beside = (
            "the computed minimum: every region was already where it was needed" if not moved else "the minimum is 0"
        )
    parts = [f"{len(syncs)} steps with a sync moved {_bytes(moved)}, {beside}"]
    parts += [f"median {1000 * median(times):.1f} ms a sync"] if times else []
    parts += [f"median {median(rates):.2f} GB/s"] if rates else []
    return f"<p>{escape('; '.join(parts))}.</p>"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _samples(run_dir: Path) -> str:
    paths = sample_files(run_dir)
    parts = []
    for path in dict.fromkeys(paths[:1] + paths[-1:]):
        text = path.read_text(encoding="utf-8", errors="replace")
        rest = f"\n\u2026 (the rest is in samples/{path.name})" if len(text) > EXCERPT else ""
        opened = " open" if path is paths[-1] else ""
        parts.append(
            f"<details{opened}><summary>{escape(path.stem.replace('_', ' '))}</summary>"
            f"<pre>{escape(text[:EXCERPT] + rest)}</pre></details>"
        )
    return "".join(parts)


def _environment(path: Path) -> str:
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}
    return _table(
        ["what", "found"], [[name, "none" if value in (None, "") else str(value)] for name, value in shown.items()]
    )


def _configuration(path: Path) -> str:
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<section><details><summary>Configuration</summary><pre>{text}</pre></details></section>"


def _write(path: Path, content: bytes) -> Path:
    """All of the file or the one before it: a page that is open in a browser is never half a page."""
    half_written = path.with_name(path.name + ".tmp")
    half_written.write_bytes(content)
    os.replace(half_written, path)
    return path
