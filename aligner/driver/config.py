"""The logging settings: what is shown on the console, sent to wandb and written as samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WANDB_MODES = ("off", "offline", "online")


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
    every: int = 1
    """Print a row each this many steps (the first, the last and those with an evaluation always)."""
    wandb: str = "off"
    """off, offline (files under the run's folder, no account) or online (needs `wandb login`)."""
    project: str = "aligner"
    """wandb project."""
    name: str | None = None
    """wandb run name; none: the name of the run's folder."""
    samples_every: int = 10
    """Write rollout samples to a readable file each this many steps; 0 writes none."""
    samples_count: int = 8
    """Samples in each such file."""
    timeline_steps: int = 20
    """Each rank writes what it did and waited for in the first so many steps (run_dir/timeline); 0 writes nothing."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.wandb not in WANDB_MODES:
            # YAML reads a bare off as the boolean false, which arrives here as False or 'False'.
            hint = ' (in YAML, quote it: wandb: "off")' if str(self.wandb).lower() == "false" else ""
            raise ValueError(f"logging.wandb={self.wandb!r} is unknown; use {', '.join(WANDB_MODES)}{hint}.")
        if self.every < 1:
            raise ValueError(f"logging.every={self.every} is below 1; use 1 (every step) or more.")
        if not self.project:
            raise ValueError("logging.project is empty; give a wandb project name such as aligner.")
        if self.samples_every < 0:
            raise ValueError(f"logging.samples_every={self.samples_every} is negative; use 0 (none) or more steps.")
        if self.timeline_steps < 0:
            raise ValueError(f"logging.timeline_steps={self.timeline_steps} is negative; use 0 (none) or more steps.")
        if self.samples_count < 1:
            raise ValueError(f"logging.samples_count={self.samples_count} is below 1; use 1 or more samples.")

    def wandb_run(self) -> WandbConfig | None:
        """The wandb run asked for, or None where wandb is off."""
        if self.wandb == "off":
            return None
        return WandbConfig("online" if self.wandb == "online" else "offline", self.project, self.name)
