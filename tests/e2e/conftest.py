"""A small task, model and rule for whole jobs: random weights, rewards that random text can earn."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aligner.data.column_addition import ColumnAddition, ModelShape, write_task
from tests.report.metric_names import undeclared

RULE = '''
from aligner.reward.worker import Unparsable


def digits(prompt, response, **fields):
    """Share of digits in the response, and a little for its length: random text earns different rewards."""
    return sum(c.isdigit() for c in response) / max(1, len(response)) + 0.01 * len(response)


def brief(prompt, response, **fields):
    """1 for a response that ended by itself: some groups of 4 agree, and some do not."""
    return float(len(response) < 20)


def number(prompt, response, **fields):
    """The response as a number."""
    if not response.isdigit():
        raise Unparsable(response)
    return float(response)


def fair(prompt, response, **fields):
    """Always 1: nothing is left to learn."""
    return 1.0
'''


@dataclass(frozen=True)
class Task:
    """A folder with model/, a file of rows of each kind of data, and rule.py."""

    folder: Path

    def overrides(self, run_dir: Path) -> list[str]:
        """Settings of a short job on this task."""
        return [
            "--config-name=quickstart",
            f"model.path={self.folder / 'model'}",
            f"data.path={self.folder / 'prompts.jsonl'}",
            f"data.eval_path={self.folder / 'heldout.jsonl'}",
            f"reward.rule='{self.folder / 'rule.py'}:digits'",
            f"run_dir={run_dir}",
            "reward.workers=1",
            "train.steps=5",
            "train.eval_every=0",
            "train.save=false",
            "train.report=false",
            "data.prompts_per_step=4",
            "algorithm.group_size=4",
            "sampling.max_tokens=20",
            "rollout.kv_cache_mib=16",
            "policy.micro_tokens=256",
            "policy.optimizer.warmup_steps=0",
        ]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The task with a model of 2 layers, 4 heads, 2 key/value heads."""
    folder = tmp_path_factory.mktemp("task")
    shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
    write_task(folder, ColumnAddition(demonstrations=256, prompts=64, heldout=16, preferences=64), shape)
    (folder / "rule.py").write_text(RULE)
    _sharpen(folder / "model")
    return Task(folder)


def _sharpen(folder: Path) -> None:
    """An untrained model answers every prompt alike; larger weights make its answers depend on the prompt."""
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "norm" in name:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
        else:
            weight *= 8.0 if "embed" in name else 5.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def job(torchrun: Callable[..., Any], task: Task, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """job(ranks, *overrides) runs a GRPO job and returns its metrics rows."""

    runs = itertools.count()

    def run(ranks: int, *overrides: str, seconds: float = 200) -> list[dict[str, Any]]:
        run_dir = tmp_path / f"run{next(runs)}"
        program = ["-m", "aligner.main", *task.overrides(run_dir), *overrides]
        done: subprocess.CompletedProcess[str] = torchrun(ranks, program, seconds=seconds)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
        rows: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        if not any(override.startswith("algorithm._target_=") for override in overrides):
            assert undeclared({name for row in rows for name in row}) == []
        return rows

    return run
