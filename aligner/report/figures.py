"""The figures of a report, by matplotlib's object interface: pyplot keeps figures and a backend for the whole process."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from aligner.report.metric_registry import METRICS, PHASES, title_of
from aligner.report.metrics import Row
from aligner.report.statistics import from_to, main_metric, phase_seconds, series, sync_rate, timed, trailing_mean

if TYPE_CHECKING:  # matplotlib takes half a second and is wanted once, at the end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY = (
    "#3b7dc4", "#e07b39", "#3f9e6e", "#8b6fc0", "#c8504b", "#37a3a3", "#8a8f98",
)  # fmt: skip
PHASE_COLORS = {phase.name: phase.color for phase in PHASES} | {"other": GREY}
RUN_COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL)


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering of the figures; the page shows the one that the reader's system prefers."""

    background: str
    ink: str
    grid: str


LIGHT = Theme("#ffffff", "#1f2430", "#e4e7ec")
DARK = Theme("#171b22", "#d7dbe2", "#2c323d")


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
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


def png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def learning_curve(rows: Sequence[Row], theme: Theme, title: str | None = None) -> Figure:
    figure, (ax,) = _grid(1, 1, 9.6, 4.4)
    name = main_metric(rows)
    _noisy_line(ax, *series(rows, name), BLUE, f"train {name}")
    steps, accuracy = series(rows, "accuracy", keep_gaps=False)
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
    ax.plot(steps, trailing_mean(values, window), color=color, label=f"{label} (mean of {window})")


def panels(rows: Sequence[Row], _theme: Theme) -> Figure | None:
    drawn_above = main_metric(rows)
    declared = sorted(((one.name, one.panel) for one in METRICS if one.panel), key=lambda pair: pair[1].place)
    present = [
        (name, panel) for name, panel in declared if name != drawn_above and series(rows, name, keep_gaps=False)[0]
    ][:6]
    if not present:
        return None
    figure, axes = _grid(3, math.ceil(len(present) / 3), 9.6, 2.2 * math.ceil(len(present) / 3))
    for ax, (name, panel) in zip(axes, present, strict=False):
        steps, values = series(rows, name)
        if panel.log and any(value > 0 for value in values):
            values = [value if value > 0 else math.nan for value in values]
            ax.set_yscale("log")
            powers = [math.log10(value) for value in values if not math.isnan(value)]
            ax.set_ylim(10 ** math.floor(min(powers)), 10 ** (math.floor(max(powers)) + 1))  # whole decades
        ax.plot(steps, values, ".-" if len(values) < 30 else "-", color=BLUE, linewidth=1.3)
        ax.set_title(panel.title + (" (log)" if panel.log else ""))
    for ax in axes[len(present) :]:
        ax.set_visible(False)
    return figure


def phases(rows: Sequence[Row], theme: Theme) -> Figure | None:
    seconds = phase_seconds(rows)
    if not seconds:
        return None
    steps = [row["step"] for row in timed(rows)]
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


def ledger(rows: Sequence[Row], _theme: Theme) -> Figure | None:
    steps, moved = series(rows, "reshard_moved_bytes", keep_gaps=False)
    minimum_steps, minimum = series(rows, "reshard_minimum_bytes", keep_gaps=False)
    if not any(moved):
        return None
    figure, (left, right) = _grid(2, 1, 9.6, 2.5)
    left.plot(steps, [value / 1e6 for value in moved], color=BLUE, linewidth=3, alpha=0.5, label="moved")
    left.plot(minimum_steps, [value / 1e6 for value in minimum], "--", color=ORANGE, label="minimum")
    left.set_ylim(bottom=0, top=1.3 * max(moved) / 1e6)
    left.set_title("MB a sync")
    left.legend(loc="lower right")
    rate = [(row["step"], value) for row in rows if (value := sync_rate(row)) is not None]
    right.plot([step for step, _ in rate], [value for _, value in rate], color=GREEN, linewidth=1.3)
    right.set_ylim(bottom=0)
    right.set_title("GB/s, the whole sync")
    return figure


def comparison(runs: dict[str, list[Row]], metrics: Sequence[str]) -> Figure:
    figure, axes = _grid(len(metrics), 1, 5.6 * len(metrics) + 0.6, 4.4)
    ends = {}
    for index, (label, rows) in enumerate(runs.items()):
        color = RUN_COLORS[index % len(RUN_COLORS)]
        style = ("-", "--", ":")[index // len(RUN_COLORS) % 3]
        for ax, name in zip(axes, metrics, strict=True):
            steps, values = series(rows, name, keep_gaps=False)
            if ax is axes[0]:
                ends[label] = values
                label_ends = f"{label}: {from_to(values)}"
                ax.plot(steps, values, f"o{style}", color=color, markersize=3.5, label=label_ends)
            else:
                ax.plot(steps, trailing_mean(values, max(1, len(values) // 12)), style, color=color, linewidth=1.3)
    titles = {name: title_of(name) if name == "accuracy" else f"train {title_of(name)}" for name in metrics}
    for ax, name in zip(axes, metrics, strict=True):
        ax.set_title(titles[name] + ("" if ax is axes[0] else " (trailing mean)"))
    axes[0].legend(loc="best", fontsize=8)
    lifts = sorted(values[-1] - values[0] for values in ends.values())
    scale, unit = (100, " points") if metrics[0] == "accuracy" else (1, "")
    low, middle, high = (f"{scale * lift:+.3g}" for lift in (lifts[0], median(lifts), lifts[-1]))
    figure.suptitle(f"{len(runs)} runs, {titles[metrics[0]]}: {low} to {high}{unit} (median {middle})", fontsize=11)
    return figure
