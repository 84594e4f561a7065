"""Settings of hang detection (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast, Finite


@dataclass(frozen=True)
class HangConfig:
    """Limits of hang detection. A hang ends the job with one report, in run_dir/faults and on the console."""

    after_seconds: Annotated[float, Finite(), AtLeast(2)] = 300.0
    """During training, in seconds: a rank that makes no progress for this long, and does not wait for a rank that does, ends
    the job. Progress is a role call, a message, a microbatch, an engine step or a scored row; use more than the longest of
    them takes."""
    setup_seconds: Annotated[float, Finite(), AtLeast(2)] = 1800.0
    """The same before the first step, while models are loaded and engines started, and after the last step."""
    dead_seconds: Annotated[float, Finite(), AtLeast(2)] = 30.0
    """A rank without heartbeats for this long, in seconds, or whose process is stopped, counts as dead: its host is down, or
    a computation holds Python's lock. A process that has ended is noticed within two seconds."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.setup_seconds < self.after_seconds:
            raise ValueError(
                f"hang.setup_seconds={self.setup_seconds} must be at least hang.after_seconds={self.after_seconds}."
            )

    def check_scoring(self, longest_row_s: float) -> None:
        """Raises ValueError if scoring one row, which may take `longest_row_s` seconds, would count as a hang."""
        if longest_row_s >= self.after_seconds:
            raise ValueError(
                f"hang.after_seconds={self.after_seconds} would end the job while a row is scored, which may take "
                f"{longest_row_s:g} s (reward.timeout_s, or a component's); use more than that, or a shorter timeout_s."
            )
