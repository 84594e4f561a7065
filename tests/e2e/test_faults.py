"""Whole jobs with a fault: the report names the rank, the call and the sample; tools/bench/faults.py has more of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OWN = """
import os, signal, time

from aligner.algorithms.grpo import GrpoConfig


def scoring(roles, batches, cfg):
    for batch in batches:
        roles.reward.score(roles.policy.scatter(batch))
        yield None


def stopping(prompt, response, **fields):
    \"\"\"Rank 1, whose worker this is, stops while the row is scored.\"\"\"
    if os.environ["RANK"] != "1":
        return float(len(response))
    time.sleep(3)
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(100)


def broken(roles, batches, cfg: GrpoConfig):
    \"\"\"vLLM's executor fails on one of two ranks that generate as one replica.\"\"\"
    if roles.policy.world.rank == 1:
        executor = roles.rollout.engine._llm.engine_core.engine_core.model_executor
        executor.execute_model = failing
    for batch in batches:
        roles.policy.reshard_to(roles.rollout)
        roles.rollout.generate(batch, num_samples=2)
        yield None


def failing(*args, **kwargs):
    raise RuntimeError("an engine step went wrong")
"""


def _run(torchrun: Callable[..., Any], task: Any, folder: Path, *settings: str) -> tuple[str, str]:
    """(console, report)."""
    (folder / "own.py").write_text(OWN)
    run = folder / "run"
    base = [one for one in task.overrides(run) if "algorithm=sft" not in settings or "group_size" not in one]
    done = torchrun(2, ["-m", "aligner.main", *base, "data.eval_path=null", *settings], seconds=150)
    assert done.returncode != 0
    reports = list((run / "faults").glob("*.txt"))
    assert len(reports) == 1, done.stderr[-4000:]
    return done.stderr, reports[0].read_text()


@pytest.mark.matrix
def test_a_rank_that_stops_while_it_scores(torchrun: Callable[..., Any], task: Any, tmp_path: Path) -> None:
    """It cannot say anything any more: what it told last is in the report, the sample among it."""
    settings = "algorithm=sft data=demonstrations algorithm.roles=[policy,reward] reward.rule=own.stopping"
    settings += f" algorithm._target_=own.scoring data.path={task.folder}/demonstrations.jsonl reward.timeout_s=50"
    settings += " hang.dead_seconds=4 hang.after_seconds=100"
    console, report = _run(torchrun, task, tmp_path, *settings.split())
    found = re.search(
        r"rank (1) is stopped \(process \d+ on [^)]*\), for \d+ s .*at step 1, call \d+: reward.score", report
    )
    assert found is not None, report
    assert found[0] in console
    rows = re.findall(rf"rank {found[1]}: stopping, row (\d+): prompt '[^']+', response '[^']+'", report)
    assert len(rows) == 1, f"one worker, one sample:\n{report}"
    assert re.search(rf"rank {found[1]}, MainThread \(last known\):\n(    .*\n)+", report)


@pytest.mark.matrix
def test_an_engine_that_fails_on_one_rank(torchrun: Callable[..., Any], task: Any, tmp_path: Path) -> None:
    settings = "algorithm._target_=own.broken placement.rollout.tensor=2"
    console, report = _run(torchrun, task, tmp_path, *settings.split())
    assert report.startswith("aligner: error on rank 1: RuntimeError: an engine step went wrong\n")
    assert "in failing" in console, "where it was raised"
    assert re.search(r"^1 .* rollout.generate", report, re.MULTILINE), report
