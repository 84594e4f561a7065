"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math

from aligner.trainer.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Warm-up: lr (step + 1) / warmup_steps. Then constant, or decay from lr to lr x min_lr_ratio over the remaining
    steps until `decay_steps` (`total_steps` if 0): linear, or cosine (Loshchilov & Hutter 2016, equation 5
    without restarts).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or total_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    decay = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay)
