"""Settings of what is done around the algorithm: how long, logging, exports (no torch)."""

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


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is done beside training."""

    steps: int = 100
    """Iterations of the loop."""
    eval_every: int = 10
    """Iterations between evaluations on held-out prompts (also before the first and after the last); 0: never."""
    eval_temperature: float = 1.0
    """Sampling temperature in evaluations; 0 is greedy."""
    eval_reward: str | None = None
    """Component of the reward that evaluations report (see reward.components); none: the whole reward."""
    save: bool = True
    """Write run_dir/model, a Hugging Face checkpoint, at the end."""
    export_every: int = 0
    """Iterations between Hugging Face exports to run_dir/exports/step_N; 0: none."""
    export_keep: int = 0
    """Most such exports that stay, the newest (the best is not counted); 0: all."""
    keep_best: bool = False
    """Export whenever an evaluation is better than all before, the one before the first step too; run_dir/best is a link
    to it. Takes the room of a model (of two while one replaces the other)."""
    best_metric: str | None = None
    """What keep_best goes by: accuracy, heldout_pair_accuracy or heldout_margin (higher is better), or heldout_loss
    (lower is better); null: accuracy (the mean of eval_reward on held-out prompts, or of pairs) where it is known, else
    heldout_loss."""
    report: bool = True
    """Write run_dir/report.html and a PNG of the learning curve at the end."""
