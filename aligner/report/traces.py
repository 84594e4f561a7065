"""Timelines of a run's ranks: read, merged for a viewer, and asked who waited for whom."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from aligner.health.timeline import FOLDER, HOST, TRANSFER

LOOP = "between calls"
"""Causes that are no role call: TRANSFER, both ends of a message wait for it alone, or one still packs it; LOOP, a rank
is in the loop or the driver."""


@dataclass(frozen=True)
class Span:
    """What one rank did from `start` to `end` (seconds since the ranks' common origin)."""

    rank: int
    kind: str
    """call or wait."""
    name: str
    start: float
    end: float
    step: int
    ranks: tuple[int, ...] = ()
    """Of a wait: the ranks at the other end."""


@dataclass(frozen=True)
class Segment:
    """A stretch in which a rank did one thing."""

    start: float
    end: float
    call: str = LOOP
    """The role call it was in."""
    waits_for: tuple[int, ...] | None = None
    """Not None: it only waited, for these ranks."""


@dataclass
class Use:
    """How one rank spent a step, in seconds."""

    calls: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Role call -> seconds at work in it; LOOP: outside of any."""
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Cause -> seconds without work: the role call that a rank waited for is in, TRANSFER, or LOOP."""

    @property
    def idle(self) -> float:
        """Seconds in which it waited for another rank's work, transfers not counted."""
        return sum(seconds for cause, seconds in self.waits.items() if cause != TRANSFER)


def read_spans(run_dir: str | Path) -> list[Span]:
    """Every rank's spans.

    Raises:
        ValueError: the run has no timelines, or a line of one (but a torn last one) is no trace event.
    """
    return [
        Span(
            event["pid"], event["cat"], event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6,
            event["args"]["step"], tuple(event["args"].get("ranks", ())),
        )
        for event in events(run_dir) if event["ph"] == "X" and event.get("tid", HOST) == HOST
    ]  # fmt: skip


def merge(run_dir: str | Path, out: Path) -> Path:
    """One trace of all ranks, as strict JSON, for Perfetto or chrome://tracing."""
    out.write_text(json.dumps({"traceEvents": list(events(run_dir)), "displayTimeUnit": "ms"}), encoding="utf-8")
    return out


def events(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The trace events of all ranks, rank by rank."""
    folder = Path(run_dir) / FOLDER
    files = sorted(folder.glob("rank*.json"))
    if not files:
        raise ValueError(f"{folder} has no timelines; run with logging.timeline_steps above 0.")
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if line in ("[", "]"):
                continue
            try:
                yield json.loads(line.removesuffix(","))
            except ValueError as error:
                if number == len(lines):
                    return  # the job was killed in the middle of it
                raise ValueError(f"{file}:{number} is no trace event: {line[:80]!r}; remove it.") from error


def segments_of(spans: Sequence[Span], begin: float, end: float) -> list[Segment]:
    """One rank's spans -> stretches without gaps or overlaps from `begin` to `end`; the innermost span counts.

    Args:
        spans: of one rank; they nest, as calls of functions do.
    """
    marks = sorted({begin, end, *(t for span in spans for t in (span.start, span.end) if begin < t < end)})
    segments: list[Segment] = []
    ordered = sorted(spans, key=lambda span: (span.start, -span.end))
    open_spans: list[Span] = []
    following = 0
    for start, stop in pairwise(marks):
        while following < len(ordered) and ordered[following].start <= start:
            open_spans.append(ordered[following])
            following += 1
        open_spans = [span for span in open_spans if span.end > start]
        call = next((span.name for span in reversed(open_spans) if span.kind == "call"), LOOP)
        waits = open_spans[-1].ranks if open_spans and open_spans[-1].kind == "wait" else None
        segments.append(Segment(start, stop, call, waits))
    return segments


def uses(spans: Sequence[Span]) -> dict[int, Use]:
    """How each rank spent the time that `spans` (of one step, say) cover.

    A wait's cause is what the awaited ranks do meanwhile: the call that one of them works in; where they wait as well,
    what they wait for; where all wait for each other, the message itself is on its way.
    """
    begin, end = window(spans)
    ranks = sorted({span.rank for span in spans})
    segments = {rank: segments_of([span for span in spans if span.rank == rank], begin, end) for rank in ranks}
    starts = {rank: [segment.start for segment in of_rank] for rank, of_rank in segments.items()}
    marks = sorted({mark for of_rank in starts.values() for mark in of_rank} | {end})
    spent = {rank: Use() for rank in ranks}
    for start, stop in pairwise(marks):
        now = {rank: segments[rank][bisect_right(starts[rank], start) - 1] for rank in ranks}
        for rank, segment in now.items():
            if segment.waits_for is None:
                spent[rank].calls[segment.call] += stop - start
            else:
                spent[rank].waits[cause_of(rank, now)] += stop - start
    return spent


def cause_of(rank: int, now: Mapping[int, Segment]) -> str:
    """Why a waiting rank waits, given what every rank does now."""
    seen, left = {rank}, list(now[rank].waits_for or ())
    loop = False
    while left:
        other = left.pop(0)
        if other in seen or other not in now:
            continue
        seen.add(other)
        segment = now[other]
        if segment.waits_for is not None:
            left += segment.waits_for
        elif segment.call != LOOP:
            return segment.call
        else:
            loop = True
    return LOOP if loop else TRANSFER


def window(spans: Sequence[Span]) -> tuple[float, float]:
    """From the first span's start to the last one's end."""
    return min(span.start for span in spans), max(span.end for span in spans)


def whole_steps(spans: Sequence[Span]) -> list[int]:
    """The steps of the loop (1 and up) that every rank has spans of."""
    ranks = {span.rank for span in spans}
    of: dict[int, set[int]] = {}
    for span in spans:
        of.setdefault(span.step, set()).add(span.rank)
    return sorted(step for step, there in of.items() if step > 0 and there == ranks)
