"""Every family, brought from a policy to engines cut otherwise: equal, to the last bit, to a fresh engine's answers.

The whole matrix takes long: `bash launch/test.sh -m matrix`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.families import ROWS

FAMILIES = ("llama", "llama_bias", "qwen2", "qwen3_tied", "gemma", "qwen3_moe", "mixtral", *ROWS)
CHEAP = [f"{name}:float32:{1 + number % 2}:colocated" for number, name in enumerate(ROWS) if ROWS[name].fuzz]
"""One case of each family of `ROWS`."""
COLOCATED, SPLIT = 2, 4
"""Ranks of the job: both roles on all of them, or each on its own half."""


@pytest.mark.parametrize(
    ("size", "case"),
    [
        *((COLOCATED, case) for case in ("qwen3_moe:float32:2:colocated", "gemma:bfloat16:1:colocated", *CHEAP)),
        pytest.param(SPLIT, "mixtral:float32:2:split", marks=pytest.mark.matrix),
    ],
)
def test_some_families(size: int, case: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks(size).run("tests.e2e.families_on_ranks:check", tmp_path, case, 1, seconds=300)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("where", "size"), [("colocated", COLOCATED), ("split", SPLIT)])
def test_each_family_in_every_way(
    family: str, dtype: str, tensor: int, where: str, size: int, ranks: Ranks, tmp_path: Path
) -> None:
    ranks(size).run("tests.e2e.families_on_ranks:check", tmp_path, f"{family}:{dtype}:{tensor}:{where}", 3, seconds=300)
