"""Optimizer steps that are left out because a number is not finite: how many there were, and how many may be (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast, OneOf

SKIPPED = "skipped_steps"
"""The metric: optimizer steps of an update that were left out for NaN or infinity; absent where there were none."""
EMPTY = "empty_steps"
"""The metric: those that were left out for want of a trained token; absent where there were none."""


@dataclass(frozen=True)
class NotFinite:
    """What happens where the loss or the norm of the gradients is NaN or infinite."""

    action: Annotated[str, OneOf("skip", "stop")] = "skip"
    """skip: leave that optimizer step out, so that weights, moments and schedule stay as they were. stop: end the job. The
    batch that ends it is saved in run_dir/offending."""
    max_in_row: Annotated[int, AtLeast(0)] = 3
    """skip: optimizer steps of one role that may be left out one after the other; one more stops the job."""
    max_total: Annotated[int, AtLeast(0)] = 100
    """skip: optimizer steps of one role that may be left out in a run; one more stops the job."""


class Skips:
    """The count of one role, the same on each of its ranks."""

    def __init__(self, config: NotFinite) -> None:
        self.config = config
        self.in_row = self.total = 0

    def taken(self) -> None:
        """A step was made."""
        self.in_row = 0

    def left_out(self) -> str | None:
        """A step could not be made: why the job must stop for it, or None."""
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
        """What a checkpoint keeps."""
        return {"in_row": self.in_row, "total": self.total}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken."""
        self.in_row, self.total = state["in_row"], state["total"]
