"""Roles that share ranks share memory: whatever leaves and comes back, a job's numbers and weights are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Ranks
from tests.e2e.conftest import Task
from tests.models.tiny import stored_tensors

Rows = list[dict[str, Any]]
MODES: dict[str, list[str]] = {
    "off": ["residency.mode=off"],
    "auto": ["residency.mode=auto"],
    "no room": ["residency.mode=auto", "residency.budget_gib=0"],
    "offload": ["residency.mode=offload"],
}
COMMON = ["train.steps=3", "train.eval_every=2", "train.save=true", "policy.optimizer.lr=1e-3"]
# a reference, groups that are sampled again, an evaluation between two steps
GRPO = ["algorithm=grpo", "algorithm.group_size=4", "algorithm.loss.kl_coef=0.05", "+algorithm.more_batches=2"]
PPO = ["algorithm=ppo", "algorithm.kl_control.initial=0.1", "critic.optimizer.lr=1e-3", "critic.minibatches=2"]
TENSOR = ["placement.policy.tensor=2", "placement.rollout.tensor=2"]
PART = ["placement.rollout.ranks=[1]"]
TIMED = ("seconds", "memory_", "time", "tokens_per_second", "reshard_gigabytes")


def run_modes(torchrun: Callable[..., Any], task: Task, folder: Path, ranks: int, more: list[str]) -> dict[str, Path]:
    """Mode -> the folder of its run."""
    runs = {mode: [*task.overrides(folder / mode), *COMMON, *more, *setting] for mode, setting in MODES.items()}
    plan = folder / "plan.json"
    plan.write_text(json.dumps([[o for o in run if not o.startswith("--")] for run in runs.values()]))
    done = torchrun(ranks, ["-m", "tests.e2e.jobs", str(plan)], seconds=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-5000:]
    return {mode: folder / mode for mode in runs}


def rows_of(run: Path) -> Rows:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(TIMED)}


@pytest.mark.parametrize(
    ("ranks", "case", "more"),
    [
        pytest.param(
            1,
            "grpo ahead and carried over",
            [*GRPO, "stream.lag=1", "stream.step_tokens=8"],
            marks=pytest.mark.matrix,
        ),
        pytest.param(1, "grpo, transformers engine", [*GRPO, "rollout.engine=transformers"], marks=pytest.mark.matrix),
        pytest.param(2, "grpo TP2", [*GRPO, *TENSOR], marks=pytest.mark.matrix),
        pytest.param(2, "ppo DP2", PPO, marks=pytest.mark.matrix),
        pytest.param(2, "grpo engine on one of two", [*GRPO, *PART], marks=pytest.mark.matrix),
    ],
)
def test_a_job_is_the_same_to_the_last_bit(
    ranks: int, case: str, more: list[str], torchrun: Callable[..., Any], task: Task, tmp_path: Path
) -> None:
    more = [*more, f"reward.rule='{task.folder}/rule.py:brief'"]
    found = run_modes(torchrun, task, tmp_path, ranks, more)
    plain = rows_of(found["off"])
    assert [row["step"] for row in plain] == [0, 1, 2, 3]
    weights = stored_tensors(found["off"] / "model")
    assert any(row.get("sampled_groups", 0) > 4 for row in plain) or "grpo" not in case, "no group was sampled again"
    for mode in ("auto", "no room", "offload"):
        for row, want in zip(rows_of(found[mode]), plain, strict=True):
            assert numbers(row) == numbers(want), f"{mode}, step {row['step']}"
        got = stored_tensors(found[mode] / "model")
        assert got.keys() == weights.keys()
        assert all(torch.equal(got[name], weights[name]) for name in weights), mode
    row = plain[-1]
    assert {"memory_generate", "memory_update", "memory_reshard", "memory_logprobs", "memory_peak"} <= row.keys()
    assert row["memory_peak"] == max(value for name, value in row.items() if name.startswith("memory_"))


@pytest.mark.matrix
@pytest.mark.parametrize("keep", ["", "rollout.weights"])
def test_weights_that_were_given_up_are_sent_again_or_missed(
    keep: str, ranks: Ranks, task: Task, tmp_path: Path
) -> None:
    overrides = [o for o in task.overrides(tmp_path / "run") if not o.startswith("--")]
    more = [*TENSOR, "policy.optimizer.lr=1e-2", f"residency.keep=[{keep}]"]
    ranks(2).run("tests.e2e.residency_on_ranks:check_weights", [*overrides, *more], bool(keep), seconds=280)
