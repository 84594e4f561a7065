"""The metric that a job's best export can go by, of those that its evaluations give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aligner.check.best_metric import best_metric_of, evaluation_metrics
from aligner.config.run import TrainConfig


def held(**kinds: Any) -> Any:
    """Data of which only what is held out matters."""
    return SimpleNamespace(**{"heldout": [], "heldout_pairs": [], "heldout_answers": [], **kinds})


PROMPTS, PAIRS, ANSWERS = held(heldout=[1]), held(heldout=[1], heldout_pairs=[1]), held(heldout_answers=[1])
PAIR_FIGURES = ["accuracy", "heldout_pair_accuracy", "heldout_margin"]


@pytest.mark.parametrize(
    ("roles", "data", "known"),
    [
        (["policy", "rollout", "reward"], PROMPTS, ["accuracy"]),
        (["policy", "rollout", "reward"], PAIRS, PAIR_FIGURES),
        (["policy"], PAIRS, PAIR_FIGURES),
        (["reward_model"], PAIRS, PAIR_FIGURES),
        (["policy"], ANSWERS, ["heldout_loss"]),
        (["policy"], PROMPTS, []),
        (["reward_model"], ANSWERS, []),
    ],
)
def test_figures_of_a_job(roles: list[str], data: Any, known: list[str]) -> None:
    assert evaluation_metrics(roles, data) == known


def test_the_first_figure_is_the_choice() -> None:
    train = TrainConfig(keep_best=True)
    for data, metric in ((PAIRS, "accuracy"), (ANSWERS, "heldout_loss")):
        assert best_metric_of(train, ["policy"], data) == metric
    named = TrainConfig(keep_best=True, best_metric="heldout_margin")
    assert best_metric_of(named, ["policy"], PAIRS) == "heldout_margin"
    assert best_metric_of(TrainConfig(), ["policy"], PAIRS) is None


@pytest.mark.parametrize(
    ("train", "data", "said"),
    [
        (
            TrainConfig(keep_best=True, eval_every=0),
            PAIRS,
            r"train\.eval_every=0 never evaluates; set train\.eval_every=",
        ),
        (TrainConfig(keep_best=True), held(), r"nothing held out.*give data\.eval_path"),
        (
            TrainConfig(keep_best=True, best_metric="reward"),
            PAIRS,
            r"train\.best_metric=reward is no figure.*use accuracy, heldout_pair_accuracy, heldout_margin",
        ),
        (TrainConfig(keep_best=True, best_metric="accuracy"), ANSWERS, r"best_metric=accuracy.*use heldout_loss"),
    ],
)
def test_what_cannot_work_names_the_setting(train: TrainConfig, data: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        best_metric_of(train, ["policy"], data)
