"""Roles as a job builds them: a policy, a critic and a reward model on ranks of their own; a reward model alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.conftest import Ranks

MODULE = "tests.trainer.roles_on_ranks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from aligner.data.column_addition import ModelShape, write_model

    folder = tmp_path_factory.mktemp("roles") / "model"
    write_model(folder, ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    return folder


@pytest.fixture(scope="module")
def scorer(ranks: Ranks, model: Path) -> tuple[Path, Tensor]:
    """A trained reward model's folder, and the scores of its role."""
    folder = model.with_name("scorer")
    score_B, _ = ranks(2).run(f"{MODULE}:train_reward_model", model, folder)
    return folder, score_B


def test_a_reward_model_alone(ranks: Ranks, scorer: tuple[Path, Tensor]) -> None:
    ranks(2).run(f"{MODULE}:check_scores", *scorer)


def test_a_reward_model_from_a_folder(ranks: Ranks, model: Path, scorer: tuple[Path, Tensor]) -> None:
    ranks(2).run(f"{MODULE}:check_reward_model_from_a_folder", model, *scorer)


def test_a_critic_beside_the_policy(ranks: Ranks, model: Path, scorer: tuple[Path, Tensor]) -> None:
    ranks(2).run(f"{MODULE}:check_critic_beside_the_policy", model, scorer[0])


@pytest.mark.parametrize(
    "case",
    ["forward_microbatches", "pair_of_which_a_row_trains_nothing", "pair_that_is_left_out", "staleness"],
)
def test_updates_and_readouts(ranks: Ranks, model: Path, case: str) -> None:
    ranks(2).run(f"{MODULE}:check_{case}", model)
