"""rollout.quantization=fp8: engines hold the bits of the whole tensors' quantization, whatever ranks hold at either end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks


@pytest.mark.parametrize(("tensor", "deltas"), [(2, False), (1, False), (1, True)], ids=["TP2", "one rank", "deltas"])
def test_a_policy_in_an_fp8_rollout(ranks: Ranks, tmp_path: Path, tensor: int, deltas: bool) -> None:
    ranks(2).run("tests.roles.quantized_sync_on_ranks:check", tmp_path / "model", tensor, deltas, seconds=280)
