"""Settings of checkpoints (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the complete training state, in run_dir/checkpoints."""

    every: Annotated[int, AtLeast(0, "0: none")] = 50
    """Steps between two checkpoints; the last step has one too. 0: none, except at SIGTERM, SIGINT and SIGUSR1."""
    keep: Annotated[int, AtLeast(1)] = 2
    """Number of checkpoints to keep; older ones are removed when a newer one is complete."""
    beside: bool = True
    """Write asynchronously while training continues. false: training waits until the checkpoint is complete."""
    resume: bool = True
    """Resume from the newest complete checkpoint in run_dir, if there is one; false: a run_dir with a run is an error."""
    accept_changes: bool = False
    """Resume even if settings that affect the results differ from the checkpoint's; they are reported."""
