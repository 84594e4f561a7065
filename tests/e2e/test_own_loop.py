"""The documented example of a loop of one's own runs from outside the package, learns, and stays short."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "best_of_n.py"


def test_best_of_n_runs_and_learns(job: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path / "my_loop.py")
    rows = job(
        2,
        "algorithm._target_=my_loop.best_of_n",
        "algorithm.roles=[policy,rollout,reward]",
        "policy.optimizer.lr=3e-3",
        "train.steps=15",
    )
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2
    assert all(row["gap_max"] < 1e-4 for row in rows)


def test_the_example_is_short() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    code = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in code)
    assert lines <= 25, lines
