"""Batches of scored samples; with dynamic sampling (DAPO, section 3.2) only of groups that teach something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.objective.advantages import has_signal
from aligner.reward.role import Scores
from aligner.roles.build import Roles
from aligner.spmd import batch_ops as columns
from aligner.spmd.ref import Ref


@dataclass(frozen=True)
class Sampled:
    """One batch."""

    samples: Ref
    """`Samples`, whole groups."""
    scores: Ref
    """`Scores` of these samples."""
    report: dict[str, float] = field(default_factory=dict)
    """What dynamic sampling did, for the metrics."""


def scored_samples(
    roles: Roles, prompts: Iterable[list[Prompt]], group_size: int, more_batches: int = 0
) -> Iterator[Sampled]:
    """One batch for each step: `group_size` samples of each prompt with their scores.

    Args:
        more_batches: how many further batches of prompts a step may sample to replace groups whose rewards do not
            differ (Yu et al. 2025, arXiv 2503.14476, equation 11). A step whose groups are still too few goes on with
            those it has, or, if it has none, with what it sampled last; the report counts both.
    """
    stream = roles.rollout.stream(prompts, group_size)
    for samples in stream:
        scores = roles.reward.score(samples)
        if not more_batches:
            yield Sampled(samples, scores)
            continue
        wanted = sum(map(len, samples.shares))
        pool = _Pool(group_size)
        pool.add(samples, scores)
        while pool.rows < wanted and pool.batches <= more_batches:
            samples = next(stream)
            scores = roles.reward.score(samples)
            pool.add(samples, scores)
        yield pool.batch(roles, samples, scores, wanted)


class _Pool:
    """Groups with signal, on every rank alike."""

    def __init__(self, group_size: int) -> None:
        self.group_size, self.batches, self.groups = group_size, 0, 0
        self._samples: list[Samples] = []
        self._scores: list[Scores] = []

    @property
    def rows(self) -> int:
        """Rows kept so far."""
        return sum(part.rows for part in self._samples)

    def add(self, samples: Ref, scores: Ref) -> None:
        """Keep the groups of one batch whose rewards differ. A call of all ranks."""
        found, scored = samples.gather(), scores.gather()
        rows = has_signal(scored.reward_B, group_size=self.group_size).nonzero().flatten().tolist()
        self._samples.append(columns.take(found, rows))
        self._scores.append(columns.take(scored, rows))
        self.batches += 1
        self.groups += found.rows // self.group_size

    def batch(self, roles: Roles, samples: Ref, scores: Ref, wanted: int) -> Sampled:
        """At most `wanted` rows of what was kept, or `samples` as they are if that is nothing."""
        report = {
            "sampled_groups": float(self.groups),
            "signal_fraction": self.rows / (self.groups * self.group_size),
            "batch_filled": min(1.0, self.rows / wanted),
        }
        if not self.rows:
            return Sampled(samples, scores, report)
        rows = range(min(wanted, self.rows))
        policy = roles.policy
        placed = policy.scatter(
            columns.take(columns.join(self._samples), rows), self.group_size, policy.config.minibatches
        )
        return Sampled(placed, policy.scatter_like(placed, columns.take(columns.join(self._scores), rows)), report)
