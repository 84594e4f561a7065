"""The best evaluation so far: which figure decides, and whether a new one beats it. Pure; the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from aligner.report.metric_registry import best_metrics

if TYPE_CHECKING:
    from aligner.config.run import TrainConfig
    from aligner.data.sets import DataSets

FOLDER = "exports"
"""Under run_dir: a Hugging Face folder for each export."""
HIGHER_IS_BETTER = best_metrics()
"""Every metric of an evaluation that can choose, the first choice first."""


class Best:
    """The best value of one figure, and its step."""

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
            ValueError: it is of another figure.
        """
        if state["metric"] != self.metric:
            raise ValueError(
                f"train.best_metric={self.metric}, but the best so far was chosen by {state['metric']}; "
                f"set train.best_metric={state['metric']}, or train.keep_best=false."
            )
        self.step, self.value = state["step"], state["value"]


def figures(roles: Collection[str], data: DataSets) -> list[str]:
    """What evaluations of this data by these roles will hold, the first choice first (see `Evaluation.run`)."""
    prompts = bool(data.heldout) and {"rollout", "reward"} <= set(roles)
    pairs = bool(data.heldout_pairs) and bool({"policy", "reward_model"} & set(roles))
    answers = bool(data.heldout_answers) and "policy" in roles
    found = {
        "accuracy": prompts or pairs,
        "heldout_loss": answers,
        "heldout_pair_accuracy": pairs,
        "heldout_margin": pairs,
    }
    return [name for name in HIGHER_IS_BETTER if found[name]]


def best_of(train: TrainConfig, roles: Collection[str], data: DataSets) -> Best | None:
    """Nothing yet, of the figure that train.best_metric names; None where train.keep_best is false.

    Raises:
        ValueError: there is no such figure, or no evaluation gives it.
    """
    if not train.keep_best:
        return None
    if not train.eval_every:
        raise ValueError(
            "train.keep_best=true keeps the best by evaluation, and train.eval_every=0 never evaluates; "
            "set train.eval_every=10, or train.keep_best=false."
        )
    known = figures(roles, data)
    if not known:
        raise ValueError(
            "train.keep_best=true keeps the best by evaluation, and there is nothing held out that these roles could be "
            "evaluated on; give data.eval_path, or set train.keep_best=false."
        )
    if train.best_metric is not None and train.best_metric not in known:
        raise ValueError(
            f"train.best_metric={train.best_metric} is no figure of this job's evaluations; use {', '.join(known)}, "
            "or null (the first of them)."
        )
    return Best(train.best_metric or known[0])
