"""Episodes that a job has saved: played again in a fresh environment, and their log-probabilities beside transformers' of the export."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aligner.report.sample_records import read_records
from tests.conftest import ROOT
from tests.e2e.conftest import Task
from tests.torchrun import launch
from tools.replay import main

GAME = '''
class Game:
    """Three turns; it says and pays what was said before and its seed make of it. `rng` is Python's own: another one differs."""

    salt = 0

    def reset(self, row, seed):
        self.seed, self.turn = seed + self.salt, 0
        return str(seed % 97)

    def step(self, text):
        self.turn += 1
        said = sum(map(ord, text)) + self.seed
        return str(said % 89), (said % 10) / 10, self.turn == 3
'''
TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '=' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on one rank, which save the episodes that they were made on and export the model after each."""
    folder = tmp_path_factory.mktemp("episodes")
    (folder / "game.py").write_text(GAME)
    (folder / "template.jinja").write_text(TEMPLATE)
    settings = [
        *task.overrides(folder / "run"), "algorithm=grpo_turns", "algorithm.group_size=2", "reward=environment",
        f"environment.target={folder / 'game.py'}:Game", "environment.processes=1", "sampling.max_tokens=6",
        f"data.chat_template={folder / 'template.jinja'}", "rollout.max_model_len=128", "train.steps=2",
        "train.export_every=1", "train.save=true", "logging.samples_every=1", "reward.max_missing=0.5",
    ]  # fmt: skip
    settings = [one for one in settings if not one.startswith(("reward.rule", "reward.workers"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = launch(1, ["-m", "aligner.main", *settings], cwd=folder, env=environment, seconds=200)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return folder


def test_saved_episodes_are_played_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = list(read_records(run / "run", 2))
    assert len(records) == 8 and all(record.episode and record.episode["ended"] == "done" for record in records)
    assert all(len(record.turns) == 3 for record in records)
    assert main([str(run / "run"), "2", "1", "--again"]) == 0
    assert "played again: all is as recorded" in capsys.readouterr().out


def test_another_environment_is_told_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    game = run / "game.py"
    game.write_text(GAME.replace("salt = 0", "salt = 1"))
    try:
        assert main([str(run / "run"), "2", "1", "--again"]) == 1
    finally:
        game.write_text(GAME)
    assert "turn 2: the context differs from token" in capsys.readouterr().out


@pytest.mark.parametrize("row", [0, 5])
def test_log_probabilities_are_those_of_the_weights_that_sampled(
    run: Path, row: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 2 was sampled by the weights after step 1, in float32."""
    assert main([str(run / "run"), "2", str(row), "--model", str(run / "run" / "exports" / "step_1")]) == 0
    assert "of weights 1 differ by at most" in capsys.readouterr().out
    assert main([str(run / "run"), "2", str(row), "--model", str(run / "run" / "exports" / "step_2")]) == 1
