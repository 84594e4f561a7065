"""What this rank is doing right now, and a count that grows whenever it has done something: kept for the watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Doing(NamedTuple):
    """One activity, inside another."""

    kind: str
    """loop, call or wait."""
    what: str
    ranks: Sequence[int]
    """Peers that are waited for."""
    since: float
    """time.monotonic()."""
    outer: Doing | None


class Activity:
    """Written by the main thread (`tick` by any), read by the watch's; entering and leaving take well below 1 us."""

    def __init__(self) -> None:
        self.now = Doing("loop", "the loop's own lines", (), time.monotonic(), None)
        self.broken: Doing | None = None
        """Where the exception that is under way came from."""
        self.progress = 0
        self.in_loop = False
        """Whether the loop's steps are under way: no set-up before the first, no saving after the last."""
        self.details: dict[str, Callable[[], list[str]]] = {}
        """Asked when a report is written: lines such as the sample that is being scored."""

    def tick(self) -> None:
        """Something got done: an engine step, a microbatch, a scored row."""
        self.progress += 1

    def enter(self, kind: str, what: str, ranks: Sequence[int] = ()) -> None:
        """Begin an activity inside the present one."""
        self.now = Doing(kind, what, ranks, time.monotonic(), self.now)
        self.broken = None
        self.progress += 1

    def leave(self) -> None:
        """End the present activity."""
        outer = self.now.outer
        assert outer is not None, "leave() without enter()"
        self.now = Doing(*outer[:3], time.monotonic(), None) if outer.outer is None else outer
        self.progress += 1

    def broke(self) -> None:
        """An exception passes through the present activity."""
        self.broken = self.broken or self.now

    def chain(self) -> list[Doing]:
        """The present activity with those around it, outermost first; where an exception came from, if one is under way."""
        found: list[Doing] = []
        one: Doing | None = self.broken or self.now
        while one is not None:
            found.insert(0, one)
            one = one.outer
        return found
