"""The best evaluation so far, and whether a new one beats it. Pure; the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aligner.report.metric_registry import best_metrics

HIGHER_IS_BETTER = best_metrics()
"""Every metric of an evaluation that can choose, the first choice first."""


class Best:
    """The best value of one metric of the evaluations, and its step."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.step: int | None = None
        self.value: float | None = None

    def look(self, step: int, value: float) -> bool:
        """Whether `value` is better than every one before, which it then replaces; ties keep the earlier, and what is no
        number (nothing could be scored) is never the best."""
        if not math.isfinite(value):
            return False
        if self.value is not None and not (value > self.value if HIGHER_IS_BETTER[self.metric] else value < self.value):
            return False
        self.step, self.value = step, value
        return True

    def state(self) -> dict[str, Any]:
        """What `restore` takes; JSON holds it exactly."""
        return {"metric": self.metric, "step": self.step, "value": self.value}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: it is of another metric.
        """
        if state["metric"] != self.metric:
            raise ValueError(
                f"train.best_metric={self.metric}, but the best so far was chosen by {state['metric']}; "
                f"set train.best_metric={state['metric']}, or train.keep_best=false."
            )
        self.step, self.value = state["step"], state["value"]
