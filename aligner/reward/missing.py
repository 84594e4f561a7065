"""Too many rows without a reward stop the job, with the components that failed and examples of what they said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aligner.reward.worker import Score, Status

EXAMPLES = 3


@dataclass
class Missing:
    """The rows of one component that have no score, by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """What was said of the first rows of each kind, all different."""

    def add(self, kind: str, text: str) -> None:
        """One more row."""
        self.counts[kind] += 1
        self._keep(kind, text)

    def update(self, other: Missing) -> None:
        """Those of another rank."""
        self.counts.update(other.counts)
        for kind, texts in other.examples.items():
            for text in texts:
                self._keep(kind, text)

    def _keep(self, kind: str, text: str) -> None:
        kept = self.examples.setdefault(kind, [])
        if len(kept) < EXAMPLES and text not in kept:
            kept.append(text)

    def __str__(self) -> str:
        return "; ".join(f"{count} {kind}: {' | '.join(self.examples[kind])}" for kind, count in self.counts.items())


def missing_of(scores: Sequence[Score]) -> Missing:
    """What one component lacks on this rank."""
    found = Missing()
    for score in scores:
        if score.status is not Status.OK:
            found.add(score.status.name.lower(), score.detail)
    return found


def check_missing(status: Sequence[int], found: Mapping[str, Missing], max_missing: float) -> None:
    """Decide on the whole batch, so that every rank decides alike.

    Args:
        status: `Status` of each row's reward.
        found: what each component lacks, by the setting that it comes from.

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
        else f"so there is nothing to learn from, whatever reward.max_missing={max_missing} allows"
    )
    said = " ".join(f"{source} said of {missing}." for source, missing in found.items() if missing.counts)
    raise ValueError(f"{lost} of {rows} rows have no reward ({counts}), {limit}. {said}")
