"""Loops on episodes of several turns and segments: the same numbers under any layout and engine; credit by turns is another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.algorithms.methods import BASE, SMALL, Found, Row
from tests.algorithms.test_methods import ENGINES, check_layouts
from tests.conftest import Ranks

CASES = {
    "grpo_turns": [*SMALL, "algorithm.loss.entropy_coef=0.05", "algorithm.loss.kl_coef=0.05"],
    "ppo_turns": ["algorithm.kl_control.initial=0.1", "+algorithm.loss.entropy_coef=0.05"],
    "grpo": [*SMALL, "algorithm.loss.entropy_coef=0.05", "algorithm.loss.kl_coef=0.05"],
    "ppo": ["algorithm.kl_control.initial=0.1", "+algorithm.loss.entropy_coef=0.05"],
    "gspo": [*SMALL, "+algorithm.loss.entropy_coef=0.05"],
    "reinforce_pp": ["+algorithm.loss.entropy_coef=0.05"],
    "grpo_decoupled": [*SMALL, "algorithm.loss.entropy_coef=0.05", "stream.lag=0", "stream.step_tokens=8"],
    "online_dpo": [],
}
EPISODES = [
    *(setting for setting in BASE if not setting.startswith(("reward.", "sampling.max_tokens"))),
    "reward=environment",
    "reward.max_missing=0.9",
    "environment.target=scripted",
    "sampling.max_tokens=6",
    "rollout.max_model_len=96",
]
TENSOR, CONTEXT, PIPELINE = (f"placement.policy.{axis}=2" for axis in ("tensor", "context", "pipeline"))


@pytest.fixture(scope="module")
def cache() -> dict[str, Found]:
    return {}


@pytest.fixture
def found(cache: dict[str, Found], ranks: Ranks, task: Any) -> Callable[..., Found]:
    """found(size, case, layouts): three steps of a case in a world of that size."""

    def of(size: int, case: str, layouts: dict[str, list[str]]) -> Found:
        key = f"{size} {case} {sorted(layouts)}"
        if key not in cache:
            base = [text.format(task=task.folder) for text in EPISODES]
            settings = [f"algorithm={case}", *CASES[case], "train.steps=3"]
            arguments = (base, settings, layouts, 3)
            cache[key] = ranks(size).run("tests.algorithms.episodes_on_ranks:run_case", *arguments, seconds=280)[0]
        return cache[key]

    return of


def alone(found: Callable[..., Found], case: str) -> list[Row]:
    return found(1, case, {"one rank": []})["one rank"]


@pytest.mark.parametrize("case", ["grpo_turns", "ppo_turns"])
def test_credit_by_turns_is_the_same_under_tensor_parallelism(case: str, found: Callable[..., Found]) -> None:
    check_layouts(case, alone(found, case), found(2, case, {"tensor 2": [TENSOR]}))


def test_episodes_share_prefixes_and_move_the_policy(found: Callable[..., Found]) -> None:
    for case in ("grpo_turns", "ppo_turns"):
        rows = alone(found, case)
        assert all(row["grad_norm"] > 0.05 and row["gap"] < 1e-5 for row in rows), rows
        assert rows[0]["kl" if case == "grpo_turns" else "response_kl"] < 1e-4
        assert rows[0]["shared_prefix"] > 0 or case == "ppo_turns", "samples of a group begin with one prompt"


@pytest.mark.matrix
def test_turns_have_other_advantages_than_episodes(found: Callable[..., Found]) -> None:
    for one, other in (("grpo", "grpo_turns"), ("ppo", "ppo_turns")):
        rows = [alone(found, case)[0] for case in (one, other)]
        assert rows[0]["samples"] == rows[1]["samples"] and rows[0]["reward"] == rows[1]["reward"]
        assert abs(rows[0]["grad_norm"] - rows[1]["grad_norm"]) > 1e-3 * rows[0]["grad_norm"]


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_every_loop_on_episodes_is_the_same_under_any_layout(case: str, found: Callable[..., Found]) -> None:
    layouts = {"tensor 2": [TENSOR], "context 2": [CONTEXT], "pipeline 2": [PIPELINE], "data 2": []}
    check_layouts(case, alone(found, case), found(2, case, layouts))


@pytest.mark.matrix
@pytest.mark.parametrize("case", ["grpo_turns", "ppo_turns", "gspo"])
@pytest.mark.parametrize("size", [1, 2])
def test_every_loop_on_episodes_is_the_same_on_fsdp(case: str, size: int, found: Callable[..., Found]) -> None:
    check_layouts(case, alone(found, case), found(size, case, ENGINES[size]))
