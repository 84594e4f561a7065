"""Whole jobs that play in environments: the policy's log-probabilities are the rollout's at every turn, and it learns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner.report.sample_records import read_records
from tests.conftest import ROOT
from tests.environments.test_examples import example
from tests.torchrun import launch

Job = Callable[..., list[dict[str, Any]]]
GAME = '''
class Digits:
    """Pays the share of digits in each of three turns."""

    def reset(self, row, seed):
        self.turns = 0
        return f"{seed % 10}:"

    def step(self, text):
        self.turns += 1
        share = sum(letter.isdigit() for letter in text) / max(1, len(text))
        return f"{share:.2f}", share, self.turns == 3, {"share": share}
'''


def test_a_job_plays_and_learns_by_text(job: Job, tmp_path: Path) -> None:
    template, game = tmp_path / "chat.jinja", tmp_path / "game.py"
    template.write_text(example("calculator").CHAT_TEMPLATE)
    game.write_text(GAME)
    rows = job(
        2, "reward=environment", "reward.rule=''", f"environment.target='{game}:Digits'", f"data.chat_template='{template}'",
        "sampling.max_tokens=8", "rollout.max_model_len=128", "policy.optimizer.lr=3e-3", "train.steps=12", "train.eval_every=0",
    )  # fmt: skip
    assert all(row["episodes/turns"] == 3 for row in rows)
    assert all(row["gap_max"] < 1e-4 for row in rows)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2


@pytest.fixture(scope="module")
def calculator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first commands of docs/agents.md: the task, and a model in sft/ that has imitated its demonstrations."""
    folder = tmp_path_factory.mktemp("calculator")
    example("calculator").write_task(folder, seed=0)
    paths = [f"model.path={folder}/model", f"data.path={folder}/demonstrations.jsonl", f"run_dir={folder}/sft"]
    calculator_job(folder, 2, "calculator_sft", *paths)
    return folder


def calculator_job(folder: Path, ranks: int, config: str, *overrides: str) -> list[dict[str, Any]]:
    """Rows of metrics of a job, the last of whose `overrides` is its folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = ["-m", "aligner.main", "--config-name", config, *overrides]
    done = launch(ranks, program, cwd=folder, env=environment, seconds=900)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    metrics = Path(overrides[-1].removeprefix("run_dir=")) / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def learns_with_tools(folder: Path, ranks: int, run_dir: str, *overrides: str) -> list[dict[str, Any]]:
    """The last command of docs/agents.md."""
    return calculator_job(
        folder, ranks, "calculator", f"model.path={folder}/sft/model", f"data.path={folder}/prompts.jsonl",
        f"data.eval_path={folder}/heldout.jsonl", f"environment.target={ROOT}/docs/examples/calculator.py:Calculator",
        *overrides, f"run_dir={folder}/{run_dir}",
    )  # fmt: skip


@pytest.mark.slow
def test_the_calculator_finds_out_that_its_tools_pay(calculator: Path) -> None:
    """The whole takes some minutes."""
    rows = learns_with_tools(calculator, 2, "grpo")
    held_out = [row["accuracy"] for row in rows if "accuracy" in row]
    assert held_out[-1] > held_out[0] + 0.3
    assert rows[-1]["episodes/turns"] > rows[1]["episodes/turns"] + 1


@pytest.mark.slow
def test_the_calculator_is_played_alike_under_all_layouts(calculator: Path) -> None:
    """Steps with updates between them: tokens and rewards of every episode, and weights to rounding."""
    layouts = {
        "one": (1, []),
        "two": (2, []),
        "tensor": (2, ["placement.policy.tensor=2", "placement.rollout.tensor=2"]),
    }
    few = ["train.steps=4", "train.eval_every=0", "logging.samples_every=1", "logging.samples_count=128"]
    played: dict[str, list[Any]] = {}
    for name, (ranks, overrides) in layouts.items():
        rows = learns_with_tools(calculator, ranks, name, *few, *overrides)
        assert all(row["gap_max"] < 1e-4 for row in rows if row["step"])
        records = [record for step in range(1, 5) for record in read_records(calculator / name, step)]
        played[name] = [(record.tokens, record.reward, [turn.start for turn in record.turns]) for record in records]
    assert len(played["one"]) == 4 * 128 and max(len(turns) for _, _, turns in played["one"]) > 2
    assert played["one"] == played["two"] == played["tensor"]


ROGUE = '''
import os, re, time


class Rogue:
    """Pays 1 for any turn, but of 11 seeds six end in six ways."""

    def reset(self, row, seed):
        self.fate = seed % 11
        return "go:"

    def step(self, text):
        if self.fate == 0:
            re.match(r"(a+)+$", "a" * 64 + "b")  # stuck, with Python's global lock
        if self.fate == 1:
            os._exit(1)
        if self.fate == 2:
            eaten = [bytearray(2**24) for _ in range(10**6)]
        if self.fate == 3:
            return "", "much", True
        if self.fate == 4:
            return "x" * 10**8
        if self.fate == 5:
            return b"\\xff\\xfe", 1.0, True
        time.sleep(0.01)
        return None, 1.0, True
'''


def test_stuck_crashing_eating_and_lying_environments_are_counted_and_masked(job: Job, tmp_path: Path) -> None:
    template, rogue = tmp_path / "chat.jinja", tmp_path / "rogue.py"
    template.write_text(example("calculator").CHAT_TEMPLATE)
    rogue.write_text(ROGUE)
    rows = job(
        2, "reward=environment", "reward.rule=''", f"environment.target='{rogue}:Rogue'", f"data.chat_template='{template}'",
        "environment.step_timeout_s=3", "environment.memory_mib=256", "environment.long_output=fail", "reward.max_missing=1",
        "sampling.max_tokens=4", "rollout.max_model_len=128", "train.steps=4", "train.eval_every=0", "seed=1",
    )  # fmt: skip
    ended: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("episodes/ended_"):
                ended[name.removeprefix("episodes/ended_")] = ended.get(name.removeprefix("episodes/ended_"), 0) + value
    assert set(ended) == {"done", "timeout", "crashed", "memory", "protocol"}
    assert ended["protocol"] > ended["timeout"] and ended["done"] > sum(ended.values()) / 2
    assert all(row["reward"] == 1.0 for row in rows)  # a failed episode is no zero
