"""A sample of tools/bench/kill.py: ranks killed at random moments, and a run that is the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from tests import fork_server
from tools.bench import kill


@pytest.mark.parametrize(
    ("episodes", "runs"),
    [
        ([], 3),
        pytest.param([], 8, marks=pytest.mark.matrix),
        pytest.param(["--episodes"], 5, marks=pytest.mark.slow),
    ],
    ids=["", "more", "episodes"],
)
def test_killed_runs_end_as_if_nothing_had_happened(
    episodes: list[str], runs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*episodes, "--runs", str(runs), "--kills", "1", "--seed", "1", "--out", str(tmp_path)]
    with mock.patch("subprocess.Popen", fork_server.Popen):
        status = kill.main(options)
    said = capsys.readouterr().out
    assert status == 0, said
    assert f"{runs} of {runs} runs are the same to the last bit" in said
    kills = int(said.rpartition("after ")[2].split()[0])
    assert kills >= runs - 2, "a sample in which hardly anybody is killed says nothing"
