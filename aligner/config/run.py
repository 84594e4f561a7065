"""Settings of how long a job runs, and what is done beside training (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast, Finite


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is done beside training."""

    steps: Annotated[int, AtLeast(1)] = 100
    """Iterations of the loop."""
    eval_every: Annotated[int, AtLeast(0, "0: never")] = 10
    """Iterations between evaluations on held-out prompts (also before the first and after the last); 0: never."""
    eval_temperature: Annotated[float, AtLeast(0, "0: greedy")] = 1.0
    """Sampling temperature in evaluations; 0 is greedy."""
    eval_samples: Annotated[int, AtLeast(1)] = 1
    """Answers (or episodes) to each held-out prompt in evaluations: accuracy is the mean over all of them, and pass@k, for k up
    to this number, says how often one of k succeeds."""
    eval_success: Annotated[float, Finite()] = 1.0
    """Least reward of an answer that counts as a success in pass@k."""
    eval_reward: str | None = None
    """Component of the reward that evaluations report (see reward.components); none: the whole reward."""
    save: bool = True
    """Write run_dir/model, a Hugging Face checkpoint, at the end."""
    export_every: Annotated[int, AtLeast(0, "0: none")] = 0
    """Iterations between Hugging Face exports to run_dir/exports/step_N; 0: none."""
    export_keep: Annotated[int, AtLeast(0, "0: all")] = 0
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

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.eval_samples > 1 and self.eval_temperature == 0:
            raise ValueError(
                f"train.eval_samples={self.eval_samples} would give the same answer every time with train.eval_temperature=0; use 1, "
                "or a temperature above 0."
            )
