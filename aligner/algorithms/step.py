"""What a loop hands to the driver after each iteration."""

from __future__ import annotations

from dataclasses import dataclass

from aligner.spmd.ref import Ref


@dataclass(frozen=True)
class Step:
    """Values of one iteration; the driver fetches and logs what is there."""

    metrics: Ref
    """{metric: float}, from `policy.update`."""
    samples: Ref | None = None
    """`Samples` of this iteration."""
    scores: Ref | None = None
    """`Scores` of these samples."""
