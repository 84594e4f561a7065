"""Which metric of a job's evaluations chooses the best export."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from aligner.report.metric_registry import best_metrics

if TYPE_CHECKING:
    from aligner.config.run import TrainConfig
    from aligner.data.sets import DataSets


def evaluation_metrics(roles: Collection[str], data: DataSets) -> list[str]:
    """What evaluations of this data by these roles will hold, the first choice first (see `Evaluation.run`)."""
    prompts = bool(data.heldout) and {"rollout", "reward"} <= set(roles)
    pairs = bool(data.heldout_pairs) and bool({"policy", "reward_model"} & set(roles))
    answers = bool(data.heldout_answers) and "policy" in roles
    given = {
        "accuracy": prompts or pairs,
        "heldout_loss": answers,
        "heldout_pair_accuracy": pairs,
        "heldout_margin": pairs,
    }
    return [name for name in best_metrics() if given[name]]


def best_metric_of(train: TrainConfig, roles: Collection[str], data: DataSets) -> str | None:
    """The metric that chooses the best export; None where train.keep_best is false.

    Raises:
        ValueError: train.best_metric names no metric of this job's evaluations, or there is none.
    """
    if not train.keep_best:
        return None
    if not train.eval_every:
        raise ValueError(
            "train.keep_best=true keeps the best by evaluation, and train.eval_every=0 never evaluates; "
            "set train.eval_every=10, or train.keep_best=false."
        )
    known = evaluation_metrics(roles, data)
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
    return train.best_metric or known[0]
