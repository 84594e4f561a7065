"""Every supported family over several ranks: written engines answer as engines that loaded the same weights do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner.models.families import FAMILIES as DECLARED
from tests.families import ROWS

FAMILIES = ("llama", "qwen2", "qwen3_tied", "qwen3_moe", "mixtral", "gemma", "llama_bias", *ROWS)
DTYPES = ("float32", "bfloat16")
EXPERTS = [f"{family}:{dtype}:experts" for family in ("qwen3_moe", "mixtral") for dtype in DTYPES]


@pytest.fixture
def answers_agree(torchrun: Callable[..., Any], tmp_path: Path) -> Callable[..., None]:
    def check(ranks: int, cases: list[str], seconds: float) -> None:
        done = torchrun(ranks, ["-m", "tests.rollout.families", str(tmp_path), *cases], seconds=seconds)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
        assert all(done.stdout.count(f"{case}: ok") == ranks for case in cases), done.stdout

    return check


@pytest.mark.matrix
def test_one_rank(answers_agree: Callable[..., None]) -> None:
    answers_agree(1, ["qwen3_moe:float32", "mixtral:bfloat16", "gemma:float32", "llama_bias:float32"], 200)


@pytest.mark.matrix
def test_two_ranks(answers_agree: Callable[..., None]) -> None:
    answers_agree(2, ["qwen3_moe:bfloat16", "gemma:bfloat16", "mixtral:float32:experts", "llama:float32:stages"], 200)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2, 4])  # 4 ranks are more than the 2 key-value heads
def test_every_family(ranks: int, answers_agree: Callable[..., None]) -> None:
    few = [name for name, row in ROWS.items() if not DECLARED[row.config.model_type].engine.shared_kv_heads]
    plain = [f"{name}:{dtype}" for name in FAMILIES if ranks < 4 or name not in few for dtype in DTYPES]
    stages = [f"{family}:float32:stages" for family in FAMILIES if family != "qwen3_moe"]  # whose first has no experts
    answers_agree(ranks, plain + (EXPERTS + stages if ranks > 1 else []), 1700)
