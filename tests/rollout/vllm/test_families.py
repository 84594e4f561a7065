"""Every supported family over several ranks: written engines answer as engines that loaded the same weights do."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.models.families import FAMILIES as DECLARED
from tests.conftest import Ranks
from tests.families import ROWS

FAMILIES = ("llama", "qwen2", "qwen3_tied", "qwen3_moe", "mixtral", "gemma", "llama_bias", *ROWS)
DTYPES = ("float32", "bfloat16")
EXPERTS = [f"{family}:{dtype}:experts" for family in ("qwen3_moe", "mixtral") for dtype in DTYPES]
STAGES = [f"{family}:float32:stages" for family in FAMILIES if family != "qwen3_moe"]  # whose first has no experts
FEW_KV_HEADS = [name for name, row in ROWS.items() if not DECLARED[row.config.model_type].engine.shared_kv_heads]
"""Families whose engine gives each rank key-value heads of its own; 4 ranks are more than there are."""
CASES = {
    1: [f"{family}:{dtype}" for family in FAMILIES for dtype in DTYPES],
    2: [f"{family}:{dtype}" for family in FAMILIES for dtype in DTYPES] + EXPERTS + STAGES,
    4: [f"{family}:{dtype}" for family in FAMILIES if family not in FEW_KV_HEADS for dtype in DTYPES]
    + EXPERTS
    + STAGES,
}


@pytest.mark.matrix
@pytest.mark.parametrize(("size", "case"), [(size, case) for size, cases in CASES.items() for case in cases])
def test_every_family(size: int, case: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks(size).run("tests.rollout.vllm.families_on_ranks:check", tmp_path, case, seconds=300)
