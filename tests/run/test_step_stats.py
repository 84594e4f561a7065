"""What ranks say at the end of a step, merged by hand: the slowest rank's seconds, the transfer's bytes added up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.run.step_stats import StepStats, merged, step_stats_of
from aligner.spmd.memory_account import MemoryFigures


def role(**seconds: float) -> Any:
    return SimpleNamespace(seconds=dict(seconds))


def test_a_ranks_own() -> None:
    """Two models' log-probabilities add up; a call that is no phase is left out; what was told is forgotten."""
    roles = [role(logprobs=1.0, update=4.0), role(logprobs=2.0), role(save_checkpoint=9.0)]
    memory = {"update": 1.5, "save_checkpoint": 2.0, "peak": 2.5}
    assert step_stats_of(roles, (), memory, MemoryFigures()).row() == {
        "seconds_logprobs": 3.0, "seconds_update": 4.0, "memory_update": 1.5, "memory_peak": 2.5,
    }  # fmt: skip
    assert step_stats_of(roles, (), {}, MemoryFigures()).row() == {}


def test_merged() -> None:
    policy = StepStats({"seconds_update": 4.0, "seconds_reshard": 1.0}, (SyncStats(moved_bytes=100, seconds=2.0),))
    rollout = StepStats({"seconds_generate": 3.0, "seconds_reshard": 1.5}, (SyncStats(moved_bytes=10, seconds=3.0),))
    policy = replace(policy, figures=MemoryFigures({("policy", "weights"): 5.0}, {"policy.update": 7.0}))
    rollout = replace(
        rollout, figures=MemoryFigures({("policy", "weights"): 6.0, ("rollout", "cache"): 9.0}, {"policy.update": 3.0})
    )
    idle = StepStats()
    found = merged(merged(policy, idle), rollout)
    assert found == merged(policy, merged(idle, rollout))
    row = found.row()
    assert {name: row[name] for name in ("seconds_update", "seconds_generate")} == {
        "seconds_update": 4.0,
        "seconds_generate": 3.0,
    }
    assert row["reshard_moved_bytes"] == 110 and row["reshard_gigabytes_per_second"] == pytest.approx(110 / 3 / 1e9)
    # as before: the call's own seconds, which wait for the slowest rank too, stand over the sync's
    assert row["seconds_reshard"] == 1.5
    assert idle.row() == {}
    parts, beyond = {("policy", "weights"): 6.0, ("rollout", "cache"): 9.0}, {"policy.update": 7.0}
    assert found.figures == MemoryFigures(parts, beyond), "the largest of any rank"
