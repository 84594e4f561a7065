"""The documented loops of one's own run from outside the package, do what they are for, and stay short."""

from __future__ import annotations

import ast
import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "examples"
ROLES = "algorithm.roles=[policy,rollout,reward]"
Job = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """own(name, *overrides): metrics of a job on 2 ranks whose loop is a copy of the example `name`."""

    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        shutil.copy(EXAMPLES / f"{name}.py", tmp_path / "my_loop.py")
        return job(2, f"algorithm._target_=my_loop.{name}", ROLES, *overrides)

    return run


def test_best_of_n_runs_and_learns(own: Job) -> None:
    rows = own("best_of_n", "policy.optimizer.lr=3e-3", "train.steps=15")
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2
    assert all(row["gap_max"] < 1e-4 for row in rows)


@pytest.mark.matrix
def test_two_rewards_are_logged_and_learned_from(own: Job, task: Any) -> None:
    rule = task.folder / "rule.py"
    components = [f"+reward.components.{name}.rule='{rule}:{name}'" for name in ("digits", "brief")]
    rows = own("two_rewards", "reward.rule=''", *components, "policy.optimizer.lr=3e-3", "train.steps=12")
    first, last = (sum(row["reward/digits"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward/digits"] + row["reward/brief"], abs=1e-5)
    assert any(0 < row["reward/brief"] < 1 for row in rows)


def test_each_reward_is_compared_by_itself() -> None:
    """One reward of 0 and 100, one of 0 and 1: the same say. In the group of ones the large reward leaves no trace."""
    summed = example("two_rewards").summed_advantages
    components = {"large": torch.tensor([0.0, 100.0, 1.0, 1.0]), "small": torch.tensor([1.0, 0.0, 0.0, 1.0])}
    found = summed(components, torch.tensor([1.0, 100.0, 1.0, 2.0]), group_size=2)
    half = math.sqrt(0.5)  # two values: each is 1 / sqrt(2) sample deviations from their mean
    assert found.tolist() == pytest.approx([0.0, 0.0, -half, half], abs=1e-4)
    lacking = summed(components, torch.tensor([math.nan, 100.0, 1.0, 2.0]), group_size=2)
    assert lacking[:2].nan_to_num(0.0).tolist() == [0.0, 0.0], "a row without a reward, and the one left alone"


@pytest.mark.matrix
def test_what_is_solved_is_not_trained_on(own: Job, task: Any) -> None:
    rows = own("skip_solved", f"reward.rule='{task.folder / 'rule.py'}:fair'", "train.steps=3")
    assert [row["skipped"] for row in rows] == [1.0, 1.0, 1.0]
    assert not any("grad_norm" in row for row in rows)


@pytest.mark.matrix
def test_what_is_not_solved_is_trained_on(own: Job) -> None:
    rows = own("skip_solved", "train.steps=3")
    assert [row["skipped"] for row in rows] == [0.0, 0.0, 0.0]
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "most"),
    [("best_of_n", 25), ("two_rewards", 40), ("skip_solved", 40), ("two_reward_models", 40), ("two_policies", 40)],
)
def test_the_examples_are_short(name: str, most: int) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    code = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in code)
    assert lines <= most, lines


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
