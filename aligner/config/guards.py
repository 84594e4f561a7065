"""Settings of the guards: which sign of trouble is looked for, and what is done when it shows (no torch)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from aligner.trainer.skips import NotFinite

ACTIONS = ("off", "warn", "stop")
SKIPPING = ("off", "skip", "warn", "stop")


@dataclass(frozen=True)
class Limit:
    """A metric above a limit."""

    action: str = "warn"
    """off, warn (a line on the console, and guard/NAME=1 in metrics.jsonl) or stop (end the job)."""
    limit: float = math.inf
    """The largest value that is not remarked on."""
    steps: int = 1
    """Steps in a row above it before anything is done."""


@dataclass(frozen=True)
class Streak:
    """Something that is no harm once."""

    action: str = "warn"
    """off, warn (a line on the console, and guard/NAME=1 in metrics.jsonl) or stop (end the job)."""
    steps: int = 1
    """Steps in a row before anything is done."""


@dataclass(frozen=True)
class EmptyBatch:
    """Batches of which no token is trained on: every row left out, every answer masked."""

    action: str = "skip"
    """skip: no optimizer step is made on it, and it is said. warn: said, and the step is made (momentum and decay move
    the weights). stop: end the job. off: as warn, unsaid."""
    steps: int = 1
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
    say_every: int = 100
    """While a guard keeps warning, it is said once in so many steps."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        self.not_finite.check("guards.not_finite")
        for name in (entry.name for entry in dataclasses.fields(self)):
            guard = getattr(self, name)
            if not isinstance(guard, Limit | Streak | EmptyBatch):
                continue
            works = SKIPPING if isinstance(guard, EmptyBatch) else ACTIONS
            if guard.action not in works:
                # YAML reads a bare off as the boolean false, which arrives here as False or 'False'
                hint = ' (in YAML, quote it: action: "off")' if str(guard.action).lower() == "false" else ""
                raise ValueError(f"guards.{name}.action={guard.action} is unknown; use {', '.join(works)}{hint}.")
            if guard.steps < 1:
                raise ValueError(f"guards.{name}.steps={guard.steps} must be at least 1.")
            if isinstance(guard, Limit) and not guard.limit > 0:
                raise ValueError(f"guards.{name}.limit={guard.limit} must be more than 0; action=off turns it off.")
        if self.say_every < 1:
            raise ValueError(f"guards.say_every={self.say_every} must be at least 1.")
