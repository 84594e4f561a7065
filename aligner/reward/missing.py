"""Count rows without a reward by kind, and stop the job with examples if there are too many (reward.max_missing)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aligner.reward.worker import Score, Status

EXAMPLES = 3


@dataclass
class MissingScores:
    """Rows of one component without a score: counts and example details by kind of failure."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Up to EXAMPLES distinct details per kind."""

    def add(self, kind: str, text: str) -> None:
        """Count one row."""
        self.counts[kind] += 1
        self._keep(kind, text)

    def update(self, other: MissingScores) -> None:
        """Add the counts of another rank."""
        self.counts.update(other.counts)
        for kind, texts in other.examples.items():
            for text in texts:
                self._keep(kind, text)

    def _keep(self, kind: str, text: str) -> None:
        details = self.examples.setdefault(kind, [])
        if len(details) < EXAMPLES and text not in details:
            details.append(text)

    def __str__(self) -> str:
        return "; ".join(f"{count} {kind}: {' | '.join(self.examples[kind])}" for kind, count in self.counts.items())


def missing_of(scores: Sequence[Score]) -> MissingScores:
    """The missing scores of one component on this rank."""
    missing = MissingScores()
    for score in scores:
        if score.status is not Status.OK:
            missing.add(score.status.name.lower(), score.detail)
    return missing


def check_missing(status: Sequence[int], missing: Mapping[str, MissingScores], max_missing: float) -> None:
    """Raises if too many rows of the global batch have no reward; all ranks pass the same arguments and agree.

    Args:
        status: `Status` of each row's reward.
        missing: missing scores by component, keyed by the setting that defines the component.
        max_missing: largest allowed fraction of rows without a reward (reward.max_missing).

    Raises:
        ValueError: more rows without a reward than max_missing allows, or no row has one.
    """
    kinds = Counter(Status(number).name.lower() for number in status if number != Status.OK)
    lost, rows = kinds.total(), len(status)
    if not lost or (lost <= max_missing * rows and lost < rows):
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    limit = (
        f"more than reward.max_missing={max_missing}"
        if lost > max_missing * rows
        else f"so there is nothing to train on, whatever reward.max_missing={max_missing} allows"
    )
    details = " ".join(f"{source}: {of_component}." for source, of_component in missing.items() if of_component.counts)
    raise ValueError(f"{lost} of {rows} rows have no reward ({counts}), {limit}. {details}")
