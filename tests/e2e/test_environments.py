"""Whole jobs that play in environments: the policy's log-probabilities are the rollout's at every turn, and it learns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Torchrun
from tests.environments.test_examples import example

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


@pytest.mark.slow
def test_the_calculator_finds_out_that_its_tools_pay(torchrun: Torchrun, tmp_path: Path) -> None:
    """The commands of docs/agents.md; the whole takes some minutes."""
    example("calculator").write_task(tmp_path, seed=0)
    main = ["-m", "aligner.main", "--config-name"]
    sft = [f"model.path={tmp_path}/model", f"data.path={tmp_path}/demonstrations.jsonl", f"run_dir={tmp_path}/sft"]
    assert torchrun(2, [*main, "calculator_sft", *sft], seconds=900).returncode == 0
    paths = [
        f"data.path={tmp_path}/prompts.jsonl",
        f"data.eval_path={tmp_path}/heldout.jsonl",
        f"run_dir={tmp_path}/grpo",
    ]
    tools = f"environment.target={ROOT}/docs/examples/calculator.py:Calculator"
    grpo = torchrun(2, [*main, "calculator", f"model.path={tmp_path}/sft/model", *paths, tools], seconds=900)
    assert grpo.returncode == 0, grpo.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert held_out[-1] > held_out[0] + 0.3
    assert re.search(r"episodes/turns", json.dumps(rows[-1]))


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
        "environment.step_timeout_s=1", "environment.memory_mib=512", "environment.long_output=fail", "reward.max_missing=1",
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
