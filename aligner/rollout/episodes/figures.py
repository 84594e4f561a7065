"""What a replica spends its time on while it plays."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Figures:
    """Seconds since they were last taken."""

    total_s: float = 0.0
    """In engine steps and between them."""
    idle_s: float = 0.0
    """The engine had nothing to do: every episode was with its environment."""
    environment_s: float = 0.0
    """From a turn's end (or an episode's start) to what its environment asked for next, over all turns."""
    answers: int = 0
    """Number of these."""

    def worked(self, since: float) -> None:
        """An environment has answered; it began at `since` (time.monotonic)."""
        self.environment_s += time.monotonic() - since
        self.answers += 1
