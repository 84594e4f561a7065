"""When checkpoints are written and how many stay (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of everything that decides the rest of a run: run_dir/checkpoints."""

    every: Annotated[int, AtLeast(0, "0: none")] = 50
    """Steps between two checkpoints; the last step has one too. 0: none, but for SIGTERM, SIGINT and SIGUSR1."""
    keep: Annotated[int, AtLeast(1)] = 2
    """How many stay; older ones are removed once a newer one is complete."""
    beside: bool = True
    """Write while training goes on. false: training waits until the checkpoint is complete."""
    resume: bool = True
    """Go on from the newest whole checkpoint in run_dir, if there is one; false: a run_dir with a run is refused."""
    accept_changes: bool = False
    """Go on although settings that decide what is computed differ from the checkpoint's; they are reported."""
