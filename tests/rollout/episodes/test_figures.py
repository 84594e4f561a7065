"""Metrics of episodes, worked by hand, and of what replicas spent their time on."""

from __future__ import annotations

import pytest

from aligner.rollout.episodes.figures import Figures, episode_metrics
from tests.report.metric_names import undeclared


def test_what_a_batch_was_like() -> None:
    records = [
        {"ended": "done", "turns": 3, "sampled_tokens": 30, "metrics": {"tool_calls": 2, "won": 1}},
        {"ended": "timeout", "turns": 1, "sampled_tokens": 10, "metrics": {"tool_calls": 1}},
        {"ended": "done", "turns": 2, "sampled_tokens": 20, "metrics": {}},
    ]
    row = episode_metrics(records, tokens=150)
    assert row == {
        "episodes/turns": 2.0,
        "episodes/sampled_tokens": 20.0,
        "episodes/context_tokens": 30.0,
        "episodes/ended_done": 2.0,
        "episodes/ended_timeout": 1.0,
        "environment/tool_calls": 1.5,
        "environment/won": 1.0,
    }
    assert undeclared(set(row)) == []


def test_replicas_together() -> None:
    one = Figures(total_s=10.0, idle_s=1.0, environment_s=6.0, answers=3, source={"episodes/open": 2.0})
    other = Figures(
        total_s=30.0, idle_s=3.0, environment_s=2.0, answers=1, source={"episodes/open": 3.0, "episodes/x": 1.0}
    )
    row = Figures().merged(one).merged(other).metrics()
    assert row == pytest.approx(
        {"episodes/environment_seconds": 2.0, "episodes/engine_idle": 0.1, "episodes/open": 5.0, "episodes/x": 1.0}
    )
    assert undeclared(set(row)) == []
    assert Figures(total_s=1.0).metrics() == {}  # nothing was played
