"""Whole jobs that are told to leave: saved, status 0, a line instead of tracebacks, and no temporary folder left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.conftest import Task
from tests.e2e.test_durable import rows_of

LAUNCHER, TORCHRUN = "aligner.launcher", "torch.distributed.run"
LONG = ["train.steps=500", "checkpoint.every=0", "logging.console=false"]


class Running:
    """A job under a launcher, in a process group of its own as a terminal gives it, with a TMPDIR of its own."""

    def __init__(self, launcher: str, folder: Path, overrides: list[str], options: tuple[str, ...] = ()) -> None:
        self.tmp = folder / "tmp"
        self.tmp.mkdir()
        command = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node=2", *options, "-m", "aligner.main"]
        self.said = folder / "said"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [*command, *overrides], stdout=said, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}", "TMPDIR": str(self.tmp)},
            )  # fmt: skip

    def until(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def ended(self, seconds: float = 90) -> tuple[int, str]:
        """(status, what was said)."""
        try:
            return self.process.wait(seconds), self.text()
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail(self.text())

    def text(self) -> str:
        return self.said.read_text()


def stepped(run_dir: Path, steps: int = 2) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.jsonl").exists() and len(rows_of(run_dir)) >= steps


@pytest.mark.parametrize(
    ("number", "launcher", "group"),
    [
        (signal.SIGINT, LAUNCHER, True),
        pytest.param(signal.SIGINT, LAUNCHER, False, marks=pytest.mark.matrix),
        (signal.SIGTERM, LAUNCHER, False),
        pytest.param(signal.SIGTERM, LAUNCHER, True, marks=pytest.mark.matrix),
        pytest.param(signal.SIGINT, TORCHRUN, True, marks=pytest.mark.matrix),
        pytest.param(signal.SIGTERM, TORCHRUN, False, marks=pytest.mark.matrix),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_saves_and_leaves(
    number: signal.Signals, launcher: str, group: bool, task: Task, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    wandb = ["logging.wandb=offline"] if launcher == LAUNCHER else []
    job = Running(launcher, tmp_path, [*task.overrides(run_dir), *LONG, *wandb])
    job.until(stepped(run_dir))
    (os.killpg if group else os.kill)(job.process.pid, number)
    status, said = job.ended()
    steps = rows_of(run_dir)
    line = f"{number.name}: saved after step {steps[-1]}; the same command goes on from there"
    assert line in said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]
    if launcher == LAUNCHER:
        assert status == 0, said
        assert "Traceback" not in said and "SignalException" not in said
        assert len([row for row in said.splitlines() if number.name in row]) == 1, said
    assert list(job.tmp.iterdir()) == []
