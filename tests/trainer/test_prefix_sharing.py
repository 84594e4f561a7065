"""A step whose rows share what they begin with, beside transformers' model, which computes each row by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.trainer.test_heads import classifiers  # noqa: F401
from tests.trainer.test_parity import checkpoints, each  # noqa: F401

CASES = {
    1: ["llama:share=off", "llama:share=on,micro=400", "llama:share=on,micro=60", "mistral:share=on,recompute=full"],
    2: [
        "llama:share=on,tensor=2,sp,micro=80",
        "qwen3:share=on,pipeline=2,micro=80",
        "llama:share=on,context=2,micro=400",
        "gemma3:share=on,tensor=2,recompute=selective,micro=400",
        "gemma3:share=on,context=2,micro=80",
        "qwen3_moe:share=on,expert=2,micro=100",
        "qwen2:share=auto,micro=200",
    ],
}


@pytest.mark.parametrize(("size", "case"), each(CASES))
def test_a_step_equals_that_of_separate_rows(ranks: Ranks, checkpoints: Path, size: int, case: str) -> None:  # noqa: F811
    ranks(size).run("tests.trainer.prefix_on_ranks:check_shared", checkpoints, case)


@pytest.mark.parametrize(("size", "case"), each({1: ["llama:share=on,micro=60"], 2: ["qwen3:share=on,context=2"]}))
def test_values_and_scores_equal_those_of_separate_rows(
    ranks: Ranks,
    classifiers: Path,  # noqa: F811
    size: int,
    case: str,
) -> None:
    ranks(size).run("tests.trainer.prefix_on_ranks:check_heads", classifiers, case)
