"""rollout.share_policy_weights: generation over the policy's own weights is generation over a copy of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks
from tools.family_models import write_model


@pytest.mark.parametrize(
    ("family", "size", "dtype"),
    [
        ("qwen2", 1, "float32"),
        ("gemma3_text", 1, "bfloat16"),  # a tied output layer; float32 masters that FSDP casts
        ("deepseek_v3", 1, "float32"),  # experts in one tensor, and a buffer that checkpoints hold
        ("qwen3_moe", 2, "float32"),
    ],
)
def test_samples_are_those_of_a_copy(family: str, size: int, dtype: str, ranks: Ranks, tmp_path: Path) -> None:
    write_model(family, tmp_path)
    ranks(size).run("tests.roles.shared_weights_on_ranks:check", tmp_path, dtype, seconds=200)
