"""Episodes that a job has saved: played again in a fresh environment, and their log-probabilities beside transformers' of the export."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aligner.report.sample_records import read_records
from tests.conftest import ROOT
from tests.e2e.conftest import Task
from tests.torchrun import launch
from tools.replay import compare_logprobs, main, read_run

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
REWRITES = TEMPLATE.replace(
    "{{ m.content }}", "{{ '+' if m.role == 'assistant' and loop.index < loop.length - 1 }}{{ m.content }}"
)
"""Marks what the policy said before its last turn: the third turn's context is a segment of its own."""


def play(task: Task, folder: Path, template: str, *more: str, ranks: int = 1, game: str = GAME) -> Path:
    """A job of some steps, which saves the episodes that they were made on and exports the model after each."""
    (folder / "game.py").write_text(game)
    (folder / "template.jinja").write_text(template)
    settings = [
        *task.overrides(folder / "run"), "algorithm=grpo_turns", "algorithm.group_size=2", "reward=environment",
        f"environment.target={folder / 'game.py'}:Game", "environment.processes=1", "sampling.max_tokens=6",
        f"data.chat_template={folder / 'template.jinja'}", "rollout.max_model_len=128", "train.steps=2",
        "train.export_every=1", "train.save=true", "logging.samples_every=1", "reward.max_missing=0.5", *more,
    ]  # fmt: skip
    settings = [one for one in settings if not one.startswith(("reward.rule", "reward.workers"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = launch(ranks, ["-m", "aligner.main", *settings], cwd=folder, env=environment, seconds=200)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps."""
    return play(task, tmp_path_factory.mktemp("episodes"), TEMPLATE)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "stream",
    [
        ["stream.step_tokens=5"],
        ["stream.lag=1", "stream.in_flight=true"],
        ["stream.lag=1", "stream.in_flight=true", "stream.step_tokens=5"],
    ],
    ids=["partial", "in flight", "partial, in flight"],
)
def test_each_token_has_the_log_probability_of_its_own_weights(task: Task, tmp_path: Path, stream: list[str]) -> None:
    """Episodes of several segments, sampled by several weights: each token beside the export of its version."""
    slow = GAME.replace("self.turn += 1", "self.turn += 1; __import__('time').sleep(0.3)")
    folder = play(
        task, tmp_path, REWRITES, *stream, "algorithm=grpo_decoupled", "placement=split", "train.steps=6",
        "policy.optimizer.lr=3e-3", ranks=2, game=slow,
    )  # fmt: skip
    run, seen, largest = read_run(folder / "run"), [], {}
    for step in range(1, 7):
        for record in read_records(folder / "run", step):
            assert len(record.segments) == 2 and len(record.turns) == 3
            tokens = [version for turn in record.turns for version in turn.versions]
            seen.append(len(set(tokens)))
            for version in set(tokens):
                model = folder / "run" / "exports" / f"step_{version}" if version else task.folder / "model"
                comparison = compare_logprobs(record, model, run.sampling, version)
                assert comparison.compared == tokens.count(version)
                largest[step, record.row, version] = comparison.largest
        assert main([str(folder / "run"), str(step), "0", "--again"]) == 0
    assert max(seen) > 1, "no episode has tokens of several weights"
    assert max(largest.values()) < 1e-4, largest
    print(f"{len(seen)} episodes, {sum(n > 1 for n in seen)} of several weights, at most {max(largest.values()):.1e}")
