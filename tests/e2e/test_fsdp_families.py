"""Families that only transformers knows: trained by FSDP, brought to vLLM; the engine answers as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks

GENERATED = ("granite", "olmoe", "qwen2_moe", "glm4", "exaone4", "gpt2", "gpt_oss")
"""Families that vLLM has a class of its own for."""
CASES = [("granite", 2, "split"), ("exaone4", 1, "colocated")]
"""By default; all others with -m matrix."""


@pytest.mark.parametrize(("family", "size", "where"), CASES)
def test_is_brought_to_the_engine(ranks: Ranks, tmp_path: Path, family: str, size: int, where: str) -> None:
    worst = ranks(size).run("tests.e2e.fsdp_families_on_ranks:check", family, tmp_path, where, seconds=200)
    assert max(worst) < 1e-4, worst


@pytest.mark.matrix
@pytest.mark.parametrize(("size", "where"), [(1, "colocated"), (2, "colocated"), (2, "split")])
@pytest.mark.parametrize("family", GENERATED)
def test_every_family_is_brought_to_the_engine(
    ranks: Ranks, tmp_path: Path, family: str, size: int, where: str
) -> None:
    worst = ranks(size).run("tests.e2e.fsdp_families_on_ranks:check", family, tmp_path, where, seconds=200)
    assert max(worst) < 1e-4, worst
