"""Jobs on agent programs, whole: real engines, real programs; and packages as they are (-m environments)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Torchrun
from tests.environments.endpoint.policy_folder import overrides, write_policy
from tests.environments.endpoint.verifiers_package import EXAMPLES, verifiers_program, write_words
from tests.environments.packages import interpreter

PROGRAM = Path(__file__).with_name("chat_program.py")
Job = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_policy(folder, 4096)
    return folder


@pytest.fixture
def job(torchrun: Torchrun, policy: Path, tmp_path: Path) -> Job:
    """job(command, rows, *overrides): the metrics of a short job."""

    def run(command: str, rows: Sequence[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
        run_dir = tmp_path / "run"
        done = torchrun(1, ["-m", "aligner.main", *overrides(policy, run_dir, rows, command), *more], seconds=400)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return run


def check(rows: list[dict[str, Any]], turns: float) -> None:
    """Every episode was played to its end, and the policy agrees with the engine about the log-probabilities of its ids."""
    assert len(rows) == 2
    for row in rows:
        assert row["episodes/ended_done"] == 4.0 and row["episodes/turns"] >= turns and row["gap_max"] < 1e-4, row


@pytest.mark.slow
def test_a_program_is_trained(job: Job) -> None:
    rows = [{"prompt": f"{one} + 1", "question": f"{one} + 1?"} for one in range(8)]
    metrics = job(f"{sys.executable} -S {PROGRAM} talk", rows, "data.max_prompt_tokens=40", "sampling.max_tokens=8")
    check(metrics, 3.0)
    assert all(row["reward"] == 2.5 and row["episodes/requests"] == 12.0 for row in metrics)


@pytest.mark.environments
def test_the_openai_sdk_as_the_example_uses_it(job: Job) -> None:
    rows = [{"prompt": f"{one} + 1", "answer": "?"} for one in range(8)]
    command = f"{interpreter('verifiers')} {EXAMPLES / 'agent.py'}"
    metrics = job(command, rows, "data.max_prompt_tokens=40", "sampling.max_tokens=8", "environment.step_timeout_s=120")
    check(metrics, 1.0)


@pytest.mark.environments
def test_a_verifiers_environment_of_the_package(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through /inference/v1/generate, with its own harness and renderer."""
    monkeypatch.setenv("NLTK_DATA", str(write_words(tmp_path)))
    program = verifiers_program(tmp_path)
    listed = subprocess.run([*program, "--rows", "4"], capture_output=True, text=True, check=True, timeout=120)
    rows = [json.loads(line) for line in listed.stdout.splitlines() if line.startswith("{")]
    more = ("data.max_prompt_tokens=2048", "sampling.max_tokens=12", "environment.start_timeout_s=300")
    pass_env = "environment.agent.pass_env=[NLTK_DATA]"
    metrics = job(" ".join(program), rows, *more, pass_env, "environment.step_timeout_s=120")
    check(metrics, 1.0)
    assert all("environment/verifiers_turns" in row for row in metrics)
