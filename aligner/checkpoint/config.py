"""When checkpoints are written and how many stay (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of everything that decides the rest of a run: run_dir/checkpoints."""

    every: int = 50
    """Steps between two checkpoints; 0: none."""
    keep: int = 2
    """How many stay; older ones are removed once a newer one is complete."""
    beside: bool = True
    """Write while training goes on, from a copy in host memory. false: training waits, and nothing is copied twice."""
    resume: bool = True
    """Go on from the newest whole checkpoint in run_dir, if there is one; false: a run_dir with a run in it is refused."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.every < 0:
            raise ValueError(f"checkpoint.every={self.every} must be 0 (none) or more steps.")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be 1 or more.")
