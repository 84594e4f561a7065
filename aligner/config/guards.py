"""Settings of the guards: which sign of trouble is looked for, and what is done when it shows (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from aligner.bounds import AtLeast, MoreThan, OneOf
from aligner.trainer.not_finite import NotFinite

ACTIONS = ("off", "warn", "stop")


@dataclass(frozen=True)
class Limit:
    """A metric above a limit."""

    action: Annotated[str, OneOf(*ACTIONS)] = "warn"
    """off, warn (a line on the console, and guard/NAME=1 in metrics.jsonl) or stop (end the job)."""
    limit: Annotated[float, MoreThan(0, "action=off turns it off")] = math.inf
    """The largest value that is not remarked on."""
    steps: Annotated[int, AtLeast(1)] = 1
    """Steps in a row above it before anything is done."""


@dataclass(frozen=True)
class Streak:
    """Something that is no harm once."""

    action: Annotated[str, OneOf(*ACTIONS)] = "warn"
    """off, warn (a line on the console, and guard/NAME=1 in metrics.jsonl) or stop (end the job)."""
    steps: Annotated[int, AtLeast(1)] = 1
    """Steps in a row before anything is done."""


@dataclass(frozen=True)
class EmptyBatch:
    """Batches of which no token is trained on: every row left out, every answer masked."""

    action: Annotated[str, OneOf("off", "skip", "warn", "stop")] = "skip"
    """skip: no optimizer step is made on it, and it is said. warn: said, and the step is made (momentum and decay move
    the weights). stop: end the job. off: as warn, unsaid."""
    steps: Annotated[int, AtLeast(1)] = 1
    """Steps in a row before it is said, or the job ended."""


@dataclass(frozen=True)
class GuardConfig:
    """Signs that a run has gone wrong. Each is looked for at the end of a step, on what is logged anyway."""

    not_finite: NotFinite = field(default_factory=NotFinite)
    """A loss or gradient norm of NaN or infinity."""
    kl: Limit = field(default_factory=lambda: Limit(limit=10.0))
    """The KL to the reference (metric kl: nats a token; in KTO, a response)."""
    logp_gap: Limit = field(default_factory=lambda: Limit(limit=1.0))
    """The mean difference of the rollout's and the policy's log-probabilities of sampled tokens (metric gap: nats)."""
    empty_batch: EmptyBatch = field(default_factory=EmptyBatch)
    """Updates without a trained token (metric tokens)."""
    zero_advantages: Streak = field(default_factory=lambda: Streak(steps=5))
    """Updates in which every advantage is 0, so that nothing is learned (metric advantage_abs_max)."""
    stuck_reward: Streak = field(default_factory=lambda: Streak(steps=50))
    """Mean rewards that do not change at all (metric reward)."""
    say_every: Annotated[int, AtLeast(1)] = 100
    """While a guard keeps warning, it is said once in so many steps."""
