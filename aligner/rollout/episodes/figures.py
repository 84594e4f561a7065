"""What replicas spend their time on while they play, and what episodes were like, as metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figures:
    """Of one replica, or of several together, since they were last taken."""

    total_s: float = 0.0
    """Seconds in engine steps and between them."""
    idle_s: float = 0.0
    """Seconds of these in which the engine had nothing to do: every episode was with its environment."""
    environment_s: float = 0.0
    """Seconds from a turn's end (or an episode's start) to what its environment asked for next, over all turns."""
    answers: int = 0
    """Number of these."""
    source: dict[str, float] = field(default_factory=dict)
    """What the source says of itself."""

    def worked(self, since: float) -> None:
        """An environment has answered; it began at `since` (time.monotonic)."""
        self.environment_s += time.monotonic() - since
        self.answers += 1

    def merged(self, other: Figures) -> Figures:
        """Both together."""
        names = dict.fromkeys([*self.source, *other.source])
        return Figures(
            self.total_s + other.total_s,
            self.idle_s + other.idle_s,
            self.environment_s + other.environment_s,
            self.answers + other.answers,
            {name: self.source.get(name, 0.0) + other.source.get(name, 0.0) for name in names},
        )

    def metrics(self) -> dict[str, float]:
        """By name; none where nothing was played."""
        if not self.answers:
            return {}
        return {
            "episodes/environment_seconds": self.environment_s / self.answers,
            "episodes/engine_idle": self.idle_s / max(self.total_s, 1e-9),
            **self.source,
        }


def episode_metrics(records: Sequence[Mapping[str, Any]], tokens: float) -> dict[str, float]:
    """What the episodes of a batch were like.

    Args:
        records: `Samples.episodes`.
        tokens: of all rows, contexts included.
    """
    count = max(1, len(records))
    sampled = sum(record["sampled_tokens"] for record in records)
    row = {
        "episodes/turns": sum(record["turns"] for record in records) / count,
        "episodes/sampled_tokens": sampled / count,
        "episodes/context_tokens": (tokens - sampled) / count,
    }
    for kind, number in sorted(Counter(record["ended"] for record in records).items()):
        row[f"episodes/ended_{kind}"] = float(number)
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record["metrics"].items():
            values.setdefault(name, []).append(float(value))
    return row | {f"environment/{name}": sum(of) / len(of) for name, of in sorted(values.items())}
