"""A sample of tools/bench/kill.py: ranks killed at random moments, and a run that is the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from tests import fork_server
from tools.bench import kill

RUNS = 5


@pytest.mark.parametrize("episodes", [[], pytest.param(["--episodes"], marks=pytest.mark.slow)], ids=["", "episodes"])
def test_killed_runs_end_as_if_nothing_had_happened(
    episodes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*episodes, "--runs", str(RUNS), "--kills", "1", "--seed", "1", "--out", str(tmp_path)]
    with mock.patch("subprocess.Popen", fork_server.Popen):
        status = kill.main(options)
    said = capsys.readouterr().out
    assert status == 0, said
    assert f"{RUNS} of {RUNS} runs are the same to the last bit" in said
    kills = int(said.rpartition("after ")[2].split()[0])
    assert kills >= RUNS - 2, "a sample in which hardly anybody is killed says nothing"
