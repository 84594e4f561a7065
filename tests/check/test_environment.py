"""A job with an environment: who plays in it, how long episodes may become, and what is asked of evaluations, before any start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aligner.check.rollout import check_environment, sized
from aligner.config.run import TrainConfig
from aligner.config.schema import Config, compose_config, to_config
from aligner.spmd.mesh import Mesh

SIZES = ("data.max_prompt_tokens=100", "sampling.max_tokens=50")
ROLES = ["policy", "rollout", "reward"]


def configured(*overrides: str) -> Config:
    return to_config(compose_config(["model.path=folder", *SIZES, *overrides]))


def model(positions: int) -> Any:
    return SimpleNamespace(max_positions=positions)


@pytest.mark.parametrize(
    ("overrides", "positions", "length"),
    [
        (["environment.target=g.py:Game", "environment.max_turns=4"], 4096, 100 + 4 * 50),
        (["environment.target=g.py:Game", "environment.max_turns=4"], 256, 256),
        (["environment.target=g.py:Game", "environment.max_tokens=777"], 4096, 777),
        (["environment.target=g.py:Game", "rollout.max_model_len=500"], 4096, 500),
        ([], 4096, 150),
    ],
)
def test_an_engine_has_room_for_an_episode(overrides: list[str], positions: int, length: int) -> None:
    assert sized(configured(*overrides), {"rollout": model(positions)}, {"rollout": Mesh((0,))}).max_model_len == length


@pytest.mark.parametrize(
    ("overrides", "roles", "said"),
    [
        ([], ["policy", "reward"], r"played by the role rollout; add it to algorithm\.roles"),
        (["data.kind=demonstrations"], ROLES, r"plays the rows of data\.kind=prompts"),
        (
            ["rollout.max_model_len=400", "environment.max_tokens=500"],
            ROLES,
            r"environment\.max_tokens=500 is more than rollout\.max_model_len=400.*use 400 or less",
        ),
        (
            ["rollout.max_model_len=400", "environment.max_tokens=120"],
            ROLES,
            r"more than environment\.max_tokens=120; raise it to 150 or more",
        ),
    ],
)
def test_a_mistake_names_the_setting(overrides: list[str], roles: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_environment(configured("environment.target=g.py:Game", *overrides), roles)
    check_environment(configured(*[one for one in overrides if not one.startswith("environment")]), roles)


def test_greedy_answers_are_all_the_same() -> None:
    with pytest.raises(ValueError, match=r"train\.eval_samples=4 .* train\.eval_temperature=0; use 1"):
        TrainConfig(eval_samples=4, eval_temperature=0.0).check()
    TrainConfig(eval_samples=4).check()
