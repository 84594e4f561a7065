"""`guards.not_finite`: optimizer steps that are skipped because loss or gradients are NaN or infinite, and their limits (no
torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast, OneOf

SKIPPED = "skipped_steps"
"""Metric: optimizer steps of an update that were skipped for NaN or infinity; absent if none were."""
EMPTY = "empty_steps"
"""Metric: optimizer steps that were skipped because their minibatch had no trained token; absent if none were."""


@dataclass(frozen=True)
class NotFinite:
    """What to do when the loss or the gradient norm is NaN or infinite."""

    action: Annotated[str, OneOf("skip", "stop")] = "skip"
    """skip: skip the optimizer step; weights, moments and schedule do not change. stop: end the job. The batch that ends it
    is saved in run_dir/offending."""
    max_in_row: Annotated[int, AtLeast(0)] = 3
    """With action=skip: consecutive steps of one role that may be skipped; one more stops the job."""
    max_total: Annotated[int, AtLeast(0)] = 100
    """With action=skip: steps of one role that may be skipped in a run; one more stops the job."""


class SkipCounter:
    """Counts one role's skipped steps; the same on each of its ranks."""

    def __init__(self, config: NotFinite) -> None:
        self.config = config
        self.in_row = self.total = 0

    def step_taken(self) -> None:
        """Record an optimizer step; ends a sequence of skipped ones."""
        self.in_row = 0

    def step_skipped(self) -> str | None:
        """Record a skipped step. Returns why the job must stop, or None."""
        self.in_row += 1
        self.total += 1
        config, name = self.config, "guards.not_finite"
        if config.action == "stop":
            return f"{name}.action=stop"
        if self.in_row > config.max_in_row:
            return f"{self.in_row} such steps in a row are more than {name}.max_in_row={config.max_in_row}"
        if self.total > config.max_total:
            return f"{self.total} such steps in this run are more than {name}.max_total={config.max_total}"
        return None

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"in_row": self.in_row, "total": self.total}

    def restore(self, state: Mapping[str, int]) -> None:
        """Restore the counts that `state` returned."""
        self.in_row, self.total = state["in_row"], state["total"]
