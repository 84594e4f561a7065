"""A sample of tools/bench/kill.py: ranks killed at random moments, and a run that is the same to the last bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

RUNS = 5


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    options = ["--runs", str(RUNS), "--kills", "1", "--seed", "1", "--out", str(tmp_path)]
    command = [sys.executable, "tools/bench/kill.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{RUNS} of {RUNS} runs are the same to the last bit" in done.stdout
    kills = int(done.stdout.rpartition("after ")[2].split()[0])
    assert kills >= RUNS - 2, "a sample in which hardly anybody is killed says nothing"
