"""Generate and score one batch per step, optionally with DAPO's dynamic sampling (only groups that have something to learn from)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aligner.algorithms.advantages import rows_with_signal
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.reward.role import Rewards
from aligner.roles.build import Roles
from aligner.spmd import batch_ops
from aligner.spmd.ref import Ref


@dataclass(frozen=True)
class ScoredBatch:
    """One batch of samples with their scores."""

    samples: Ref
    """`Samples`: complete groups, in order."""
    scores: Ref
    """`Rewards`, aligned with the samples."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Statistics of dynamic sampling; empty without it."""


def scored_samples(
    roles: Roles,
    prompts: Iterable[list[Prompt]],
    group_size: int,
    more_batches: int = 0,
    advantages: Callable[..., Any] | None = None,
) -> Iterator[ScoredBatch]:
    """One batch per step: `group_size` samples of each prompt, with their scores. Collective over the world.

    Args:
        group_size: samples per prompt.
        more_batches: most extra prompt batches a step may sample to replace groups whose rewards are all equal (Yu et
            al. 2025, arXiv 2503.14476, equation 11). A step that still has too few groups trains on a smaller batch,
            or on its last sampled batch if it has none; `metrics` counts both.
    """
    stream = roles.rollout.stream(prompts, group_size)
    for samples in stream:
        scores = roles.reward.score(samples)
        if not more_batches:
            yield ScoredBatch(samples, scores)
            continue
        batch_rows = sum(map(len, samples.shares))
        groups = _SignalGroups(group_size, advantages)
        groups.add(samples, scores)
        while groups.rows < batch_rows and groups.batches <= more_batches:
            samples = next(stream)
            scores = roles.reward.score(samples)
            groups.add(samples, scores)
        yield groups.batch(roles, samples, scores, batch_rows)


class _SignalGroups:
    """Groups with something to learn from, accumulated over the batches of one step; identical on every rank."""

    def __init__(self, group_size: int, advantages: Callable[..., Any] | None = None) -> None:
        self.group_size, self.advantages = group_size, advantages
        self.batches = self.groups = 0
        self._samples: list[Samples] = []
        self._scores: list[Rewards] = []

    @property
    def rows(self) -> int:
        """Rows collected so far."""
        return sum(part.rows for part in self._samples)

    def add(self, samples: Ref, scores: Ref) -> None:
        """Add the groups of one batch that have a signal. Collective over the world."""
        all_samples, all_scores = samples.gather(), scores.gather()
        signal_B = rows_with_signal(all_samples, all_scores.reward_B, self.advantages, self.group_size)
        rows = signal_B.nonzero().flatten().tolist()
        self._samples.append(batch_ops.take(all_samples, rows))
        self._scores.append(batch_ops.take(all_scores, rows))
        self.batches += 1
        self.groups += all_samples.rows // self.group_size

    def batch(self, roles: Roles, samples: Ref, scores: Ref, batch_rows: int) -> ScoredBatch:
        """The first `batch_rows` collected rows (or fewer); `samples` unchanged if there are none."""
        metrics = {
            "sampled_groups": float(self.groups),
            "signal_fraction": self.rows / (self.groups * self.group_size),
            "batch_filled": min(1.0, self.rows / batch_rows),
        }
        if not self.rows:
            return ScoredBatch(samples, scores, metrics)
        rows = range(min(batch_rows, self.rows))
        policy = roles.policy
        scattered = policy.scatter(
            batch_ops.take(batch_ops.join(self._samples), rows), self.group_size, policy.config.minibatches
        )
        return ScoredBatch(
            scattered, policy.scatter_like(scattered, batch_ops.take(batch_ops.join(self._scores), rows)), metrics
        )
