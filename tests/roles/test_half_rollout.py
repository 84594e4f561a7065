"""A rollout in bfloat16 under a float32 policy: the weights are those that transformers would load in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks
from tools.family_models import write_model


@pytest.mark.parametrize("where", ["colocated", "split"])
def test_two_replicas_hold_what_transformers_would_load(where: str, ranks: Ranks, tmp_path: Path) -> None:
    write_model("deepseek_v3", tmp_path)  # a buffer that stays float32, which no arithmetic on rollout.dtype says
    ranks(2).run("tests.roles.half_rollout_on_ranks:check", tmp_path, where, seconds=200)
