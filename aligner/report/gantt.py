"""A picture of one step, rank by rank: what each was doing, and what it waited for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aligner.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL, Theme
from aligner.report.traces import LOOP, TRANSFER, Span, Use, segments_of, uses, window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_RANKS = 64
"""Rows that are drawn at most."""
COLORS = {
    "generate": BLUE,
    "score": PURPLE,
    "logprobs": TEAL,
    "values": "#7fc4bd",
    "update": ORANGE,
    "reshard_to": GREEN,
    "map": GREY,
    "transfer": "#b0b7bd",
    "end of the step": "#8a9097",
}
FURTHER = (RED, "#b57edc", "#c9a227", "#5d7a3a", "#96624d")


def color_of(call: str, used: dict[str, str]) -> str:
    """One colour for each kind of role call; the usual ones have theirs in every picture."""
    role, _, method = call.partition(".")
    if method.startswith("map("):
        call, method = f"{role}.map", "map"
    if call not in used:
        used[call] = COLORS.get(method or role) or FURTHER[len(used) % len(FURTHER)]
    return used[call]


def gantt(spans: Sequence[Span], theme: Theme, step: int) -> Figure:
    """A row for each rank (the first 64): calls in colours, waits pale, with their share of the step beside it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    begin, end = window(spans)
    spent = uses(spans)
    ranks = sorted(spent)[:MOST_RANKS]
    figure = Figure(figsize=(9.6, 1.4 + 0.34 * len(ranks)), layout="constrained")
    ax = figure.subplots()
    used: dict[str, str] = {}
    for row, rank in enumerate(ranks):
        for segment in segments_of([span for span in spans if span.rank == rank], begin, end):
            bar = [(segment.start - begin, segment.end - segment.start)]
            if segment.waits_for is not None:
                ax.broken_barh(bar, (row - 0.36, 0.72), facecolor=theme.grid, linewidth=0)
            elif segment.call != LOOP:
                ax.broken_barh(bar, (row - 0.36, 0.72), facecolor=color_of(segment.call, used), linewidth=0)
    ax.set_yticks(range(len(ranks)), [f"rank {rank}: idle {spent[rank].idle / (end - begin):.0%}" for rank in ranks])
    ax.set_ylim(len(ranks) - 0.5, -0.5)
    ax.set_xlim(0, end - begin)
    ax.set_xlabel("seconds")
    ax.grid(axis="y", visible=False)
    handles = [Patch(color=color, label=call) for call, color in used.items()]
    handles.append(Patch(color=theme.grid, label="waits"))
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    ax.set_title(f"step {step}: {idle_summary(spent, end - begin)}", fontsize=9.5)
    return figure


def idle_summary(spent: dict[int, Use], seconds: float) -> str:
    """Idle time and its causes, in one line."""
    whole = seconds * len(spent)
    waits: dict[str, float] = defaultdict(float)
    for use in spent.values():
        for cause, waited in use.waits.items():
            waits[cause] += waited
    idle = sum(use.idle for use in spent.values())
    causes = [f"{cause} {waited / whole:.0%}" for cause, waited in by_size(waits) if cause != TRANSFER]
    causes = [cause for cause in causes if not cause.endswith(" 0%")][:3]
    for_what = f" (for {', '.join(causes)})" if causes else ""
    return f"{seconds:.2f} s, ranks idle {idle / whole:.0%}{for_what}, in transfers {waits[TRANSFER] / whole:.0%}"


def by_size(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """The largest first."""
    return sorted(seconds.items(), key=lambda item: -item[1])


def lines(spans: Sequence[Span]) -> list[str]:
    """A line for each rank: seconds by call, then seconds waited by cause."""
    begin, end = window(spans)
    spent = uses(spans)
    text = [idle_summary(spent, end - begin)]
    for rank, use in sorted(spent.items()):
        work = ", ".join(f"{call} {seconds:.3f}" for call, seconds in by_size(use.calls))
        waits = ", ".join(f"{cause} {seconds:.3f}" for cause, seconds in by_size(use.waits)) or "nothing"
        text.append(f"rank {rank}: {work}; waits for {waits}")
    return text
