"""Where the time goes from the start of a process to its first step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Startup:
    """Seconds of each phase since this process began."""

    def __init__(self, age: float | None = None) -> None:
        """Args: age: seconds that the process has lived; None: as the system says."""
        self._begin = self._last = time.monotonic()
        self._age = process_age() if age is None else age
        self.phases: dict[str, float] = {}
        """In the order in which they first ended."""

    def mark(self, phase: str) -> None:
        """What has passed since the last mark was this phase; one that comes again grows."""
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark what runs inside; what came before it counts as "other"."""
        self.mark("other")
        yield
        self.mark(name)

    def text(self) -> str:
        """One line: the whole, and each phase of a tenth of a second or more."""
        whole = self._age + time.monotonic() - self._begin
        named = {name: seconds for name, seconds in self.phases.items() if name != "other" and seconds >= 0.05}
        rest = whole - sum(named.values())
        parts = [f"{name} {seconds:.1f}" for name, seconds in named.items()]
        return f"ready after {whole:.1f} s: {', '.join([*parts, f'other {rest:.1f}'])}"


def process_age() -> float:
    """Seconds since this process was started; 0 where /proc does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
