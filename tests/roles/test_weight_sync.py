"""Several policies and several rollouts: each engine holds, and is known to hold, what was brought to it last."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Ranks


def test_two_policies_and_two_rollouts(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run("tests.roles.weight_sync_on_ranks:check", tmp_path / "model", seconds=280)
