"""Settings of what is shown and written while a job runs (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from aligner.bounds import AtLeast, NotEmpty, OneOf


@dataclass(frozen=True)
class WandbConfig:
    """A wandb run that is wanted; there is none of these when wandb is off."""

    mode: Literal["offline", "online"] = "offline"
    """offline (files under the run's folder, no account, no network) or online (needs `wandb login`)."""
    project: str = "aligner"
    """wandb project."""
    name: str | None = None
    """Run name; none: the name of the run's folder."""


@dataclass(frozen=True)
class LoggingConfig:
    """What rank 0 shows and writes while it trains; metrics.jsonl is always written."""

    console: bool = True
    """Print one table row a step, with a progress bar below it on a terminal."""
    every: Annotated[int, AtLeast(1)] = 1
    """Print a row each this many steps (the first, the last and those with an evaluation always)."""
    wandb: Annotated[str, OneOf("off", "offline", "online")] = "off"
    """off, offline (files under the run's folder, no account) or online (needs `wandb login`)."""
    project: Annotated[str, NotEmpty("aligner")] = "aligner"
    """wandb project."""
    name: str | None = None
    """wandb run name; none: the name of the run's folder."""
    samples_every: Annotated[int, AtLeast(0, "0: none")] = 10
    """Write rollout samples each this many steps, to a file to read (samples/step_N.md) and exactly (step_N.jsonl); 0 writes
    none."""
    samples_count: Annotated[int, AtLeast(1)] = 8
    """Samples in each of these files."""
    timeline_steps: Annotated[int, AtLeast(0, "0: none")] = 20
    """Each rank writes what it did and waited for in the first so many steps (run_dir/timeline); 0 writes nothing."""

    def wandb_run(self) -> WandbConfig | None:
        """The wandb run asked for, or None where wandb is off."""
        if self.wandb == "off":
            return None
        return WandbConfig("online" if self.wandb == "online" else "offline", self.project, self.name)
