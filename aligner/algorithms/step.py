"""What a loop hands to the driver after each iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

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

    def __post_init__(self) -> None:
        """Raises TypeError, on every rank alike, for what could not be logged."""
        for name in ("metrics", "samples", "scores"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Ref):
                raise TypeError(f"Step.{name} must be a Ref, as role calls return them, or None, not {_kind(value)}.")
        if not isinstance(self.more, Mapping):
            raise TypeError(f"Step.more must be {{name: number or Ref}}, not {_kind(self.more)}.")
        for name, value in self.more.items():
            if not isinstance(name, str) or not isinstance(value, (Ref, Real)):
                raise TypeError(
                    f"Step.more[{name!r}] must be a number or a Ref to {{metric: float}}, not {_kind(value)}; "
                    "float(...) makes a number of a tensor with one item."
                )


def checked_step(yielded: Any, loop: str) -> Step:
    """What a loop has yielded, which must be a `Step`.

    Args:
        loop: its name, for the message.

    Raises:
        ValueError: it is something else, on every rank alike.
    """
    if isinstance(yielded, Step):
        return yielded
    raise ValueError(
        f"{loop} yielded {_kind(yielded)}; a loop yields Step(metrics, samples, scores) of aligner.algorithms for each "
        "batch, where each is a Ref of a role call or None."
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
