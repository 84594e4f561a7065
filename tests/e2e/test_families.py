"""Every family, brought from a policy to engines cut otherwise: equal, to the last bit, to a fresh engine's answers.

The whole matrix takes long: `bash launch/test.sh -m matrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.families import ROWS

PROGRAM = Path(__file__).with_name("families_rank.py")
FAMILIES = ("llama", "llama_bias", "qwen2", "qwen3_tied", "gemma", "qwen3_moe", "mixtral", *ROWS)
CHEAP = [f"{name}:float32:{1 + number % 2}:colocated" for number, name in enumerate(ROWS) if ROWS[name].fuzz]
"""One case of each family of `ROWS`."""
COLOCATED, SPLIT = 2, 4
"""Ranks of the job: both roles on all of them, or each on its own half."""


def run(torchrun: Callable[..., Any], folder: Path, ranks: int, fresh: int, cases: list[str], seconds: float) -> None:
    done = torchrun(ranks, [str(PROGRAM), str(folder), str(fresh), *cases], seconds=seconds)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-5000:]
    assert done.stdout.split() == [word for case in cases for word in (f"{case}:", "ok")]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (COLOCATED, ["qwen3_moe:float32:2:colocated", "gemma:bfloat16:1:colocated", *CHEAP]),
        pytest.param(SPLIT, ["mixtral:float32:2:split"], marks=pytest.mark.matrix),
    ],
    ids=["colocated", "split"],
)
def test_some_families(ranks: int, cases: list[str], torchrun: Callable[..., Any], tmp_path: Path) -> None:
    run(torchrun, tmp_path, ranks, 1, cases, 300)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("where", "ranks"), [("colocated", COLOCATED), ("split", SPLIT)])
def test_each_family_in_every_way(
    family: str, where: str, ranks: int, torchrun: Callable[..., Any], tmp_path: Path
) -> None:
    cases = [f"{family}:{dtype}:{tensor}:{where}" for dtype, tensor in product(("float32", "bfloat16"), (1, 2))]
    run(torchrun, tmp_path, ranks, 3, cases, 580)
