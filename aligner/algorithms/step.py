"""What a loop hands to the driver after each iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aligner.spmd.ref import Ref


@dataclass(frozen=True)
class Step:
    """Values of one iteration; the driver fetches and logs what is there."""

    metrics: Ref | None
    """{metric: float}, from an `update`; None where this iteration only generated."""
    samples: Ref | None = None
    """`Samples` of this iteration."""
    scores: Ref | None = None
    """`Scores` of these samples."""
    more: Mapping[str, Ref | float] = field(default_factory=dict)
    """Further values by name: a number is logged as `name`, a Ref to {metric: float} as `name_metric`."""
