"""Short GRPO jobs of one rank on an environment: the real trainer and engine, a small model that knows some words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Torchrun
from tests.environments.policy_folder import overrides, write_policy

Metrics = list[dict[str, Any]]
ShortJob = Callable[..., Metrics]
"""short_job(words, rows, *overrides): the metrics of its steps."""


def short_job_in(folder: Path, torchrun: Torchrun) -> ShortJob:
    """Jobs whose files are in `folder`."""

    def run(words: Sequence[str], rows: Sequence[dict[str, Any]], *more: str) -> Metrics:
        run_dir = folder / "run"
        write_policy(folder / "policy", 4096, words)
        done = torchrun(1, ["-m", "aligner.main", *overrides(folder / "policy", run_dir, rows, *more)], seconds=500)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return run


def trained(metrics: Metrics, turns: float, episodes: int = 16) -> None:
    """It has trained on episodes that were played to their end: rewards differ and give gradients, and the policy agrees with the
    engine about the log-probabilities of the sampled ids.

    Args:
        turns: at least so many in the mean episode.
        episodes: of a step.
    """
    for row in metrics:
        assert row.get("episodes/ended_done", 0) + row.get("episodes/ended_max_turns", 0) == episodes, row
        assert row["gap_max"] < 1e-4, row
    assert sum(row["episodes/turns"] for row in metrics) >= turns * len(metrics)
    assert any(row["grad_norm"] > 1e-3 for row in metrics), metrics


def learned(metrics: Metrics) -> None:
    """The reward has risen."""
    rewards = [row["reward"] for row in metrics]
    print("reward of each step:", *(round(reward, 3) for reward in rewards))
    assert sum(rewards[-5:]) > sum(rewards[:5]), rewards
