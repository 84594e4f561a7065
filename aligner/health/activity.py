"""This rank's current activity (a stack of nested activities) and a progress counter, read by the watch thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class ActivityFrame(NamedTuple):
    """One activity, linked to the enclosing one."""

    kind: str
    """"loop", "call" (a role call) or "wait" (for values of other ranks)."""
    what: str
    ranks: Sequence[int]
    """Ranks that are waited for."""
    since: float
    """time.monotonic()."""
    outer: ActivityFrame | None


class Activity:
    """The stack of activities. Written by the main thread (`tick` by any), read by the watch thread; enter and leave take
    well below 1 us."""

    def __init__(self) -> None:
        self.current = ActivityFrame("loop", "the loop's own lines", (), time.monotonic(), None)
        self.exception_frame: ActivityFrame | None = None
        """Innermost activity through which the current exception passed."""
        self.progress = 0
        self.in_loop = False
        """Whether the training loop is running (not the set-up before the first step or the saving after the last)."""
        self.details: dict[str, Callable[[], list[str]]] = {}
        """Name -> function that returns lines for a fault report, such as the samples being scored."""

    def tick(self) -> None:
        """Count progress: an engine step, a microbatch, a scored row."""
        self.progress += 1

    def enter(self, kind: str, what: str, ranks: Sequence[int] = ()) -> None:
        """Begin an activity inside the current one."""
        self.current = ActivityFrame(kind, what, ranks, time.monotonic(), self.current)
        self.exception_frame = None
        self.progress += 1

    def leave(self) -> None:
        """End the current activity."""
        outer = self.current.outer
        assert outer is not None, "leave() without enter()"
        self.current = ActivityFrame(*outer[:3], time.monotonic(), None) if outer.outer is None else outer
        self.progress += 1

    def record_exception(self) -> None:
        """Record that an exception passes through the current activity."""
        self.exception_frame = self.exception_frame or self.current

    def chain(self) -> list[ActivityFrame]:
        """The current activity (or that of the current exception) with the enclosing ones, outermost first."""
        frames: list[ActivityFrame] = []
        frame: ActivityFrame | None = self.exception_frame or self.current
        while frame is not None:
            frames.insert(0, frame)
            frame = frame.outer
        return frames
