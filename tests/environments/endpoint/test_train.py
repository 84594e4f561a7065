"""Jobs on agent programs, whole: real engines, real programs; and packages as they are (-m environments)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments.endpoint.verifiers_package import EXAMPLES, verifiers_program, write_words
from tests.environments.packages import interpreter
from tests.environments.short_job import ShortJob, trained

PROGRAM = Path(__file__).with_name("chat_program.py")
FEW = ("train.steps=3", "algorithm.group_size=2")
"""Each program takes seconds to import its packages."""


@pytest.mark.slow
def test_a_program_is_trained(short_job: ShortJob) -> None:
    rows = [{"prompt": f"{one} + 1", "question": f"{one} + 1?"} for one in range(8)]
    metrics = short_job([], rows, f"environment.agent.command='{sys.executable} -S {PROGRAM} talk'")
    assert all(row["episodes/ended_done"] == 16 and row["episodes/turns"] == 3 for row in metrics)
    assert all(row["reward"] == 2.5 and row["episodes/requests"] == 48 and row["gap_max"] < 1e-4 for row in metrics)


@pytest.mark.environments
def test_the_openai_sdk_as_the_example_uses_it(short_job: ShortJob) -> None:
    rows = [{"prompt": f"{one} + 1", "answer": "yes"} for one in range(8)]
    command = f"environment.agent.command='{interpreter('verifiers')} {EXAMPLES / 'agent.py'}'"
    trained(short_job(["yes", "no"], rows, command, "environment.step_timeout_s=120", *FEW), turns=1, episodes=4)


@pytest.mark.environments
def test_a_verifiers_environment_of_the_package(
    short_job: ShortJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through /inference/v1/generate, with its own harness and renderer."""
    monkeypatch.setenv("NLTK_DATA", str(write_words(tmp_path)))
    program = verifiers_program(tmp_path)
    listed = subprocess.run([*program, "--rows", "4"], capture_output=True, text=True, check=True, timeout=120)
    rows = [json.loads(line) for line in listed.stdout.splitlines() if line.startswith("{")]
    metrics = short_job(
        [f"[{letter}]" for letter in "abcdehiloprsu"], rows, f"environment.agent.command='{' '.join(program)}'",
        "data.max_prompt_tokens=2048", "environment.start_timeout_s=300", "environment.step_timeout_s=120",
        "environment.agent.pass_env=[NLTK_DATA]", *FEW,
    )  # fmt: skip
    trained(metrics, turns=1, episodes=4)
    assert all("environment/verifiers_turns" in row for row in metrics)
