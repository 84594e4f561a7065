"""`Step`: what a training loop yields after each iteration, to be logged and checkpointed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from aligner.spmd.ref import Ref


@dataclass(frozen=True)
class Step:
    """Metrics, samples and scores of one iteration."""

    metrics: Ref | None
    """Ref to {metric: float}, as `update` returns it; None if nothing was trained in this iteration."""
    samples: Ref | None = None
    """Ref to the `Samples` of this iteration."""
    scores: Ref | None = None
    """Ref to their `Rewards`."""
    extra_metrics: Mapping[str, Ref | float] = field(default_factory=dict)
    """Further metrics: a number is logged as `name`, a Ref to {metric: float} as `name_metric`."""

    def __post_init__(self) -> None:
        """Raises TypeError for values that cannot be logged, on all ranks alike."""
        for name in ("metrics", "samples", "scores"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Ref):
                raise TypeError(f"Step.{name} must be a Ref, as role calls return, or None, not {_kind(value)}.")
        if not isinstance(self.extra_metrics, Mapping):
            raise TypeError(f"Step.extra_metrics must be {{name: number or Ref}}, not {_kind(self.extra_metrics)}.")
        for name, value in self.extra_metrics.items():
            if not isinstance(name, str) or not isinstance(value, (Ref, Real)):
                raise TypeError(
                    f"Step.extra_metrics[{name!r}] must be a number or a Ref to {{metric: float}}, not {_kind(value)}; "
                    "use float(...) on a tensor of one element."
                )


def checked_step(yielded: Any, loop: str) -> Step:
    """`yielded`, which must be a `Step`.

    Args:
        loop: name of the loop, for the message.

    Raises:
        ValueError: the loop yielded something else; raised on all ranks alike.
    """
    if isinstance(yielded, Step):
        return yielded
    raise ValueError(
        f"{loop} yielded {_kind(yielded)}; a loop yields aligner.algorithms.Step(metrics, samples, scores) for each "
        "batch, each a Ref returned by a role call, or None."
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
