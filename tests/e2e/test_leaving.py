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

from tests import fork_server
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
            self.process = fork_server.Popen(
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
        pytest.param(signal.SIGTERM, LAUNCHER, False, marks=pytest.mark.matrix),
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
    settings = [*task.overrides(run_dir), *LONG, *(["logging.wandb=offline"] if launcher == LAUNCHER else [])]
    job = Running(launcher, tmp_path, settings)
    job.until(stepped(run_dir))
    if number == signal.SIGINT and group and launcher == LAUNCHER:
        refused(settings, run_dir, job)
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


def refused(settings: list[str], run_dir: Path, job: Running) -> None:
    """A second job in the folder of one that lives: nothing of the first one's is touched."""
    command = [sys.executable, "-m", "aligner.main", *settings, "overwrite=true"]
    second = fork_server.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert second.returncode == 2 and f"run_dir={run_dir} is in use by another job: process " in second.stderr
    assert f"(started by process {job.process.pid}) on {os.uname().nodename}, since 20" in second.stderr
    assert rows_of(run_dir)[:2] == [1, 2]


@pytest.mark.matrix
def test_a_second_interrupt_leaves_at_once(task: Task, tmp_path: Path) -> None:
    """The loop's step takes longer than anybody waits."""
    (tmp_path / "slow.py").write_text(SLOW)
    run_dir = tmp_path / "run"
    job = Running(LAUNCHER, tmp_path, [*task.overrides(run_dir), *LONG, "algorithm._target_=slow.loop"])
    job.until(stepped(run_dir, 1))
    job.until((tmp_path / "sleeping").exists)
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(3)
    assert job.process.poll() is None, "the first one waits for the step"
    os.killpg(job.process.pid, signal.SIGINT)
    began = time.monotonic()
    status, said = job.ended()
    assert status == 128 + signal.SIGINT and time.monotonic() - began < 20
    assert rows_of(run_dir) == [1] and not list((run_dir / "checkpoints").glob("*"))
    assert "aligner: SIGINT again: exiting immediately" in said and "Traceback" not in said
    assert list(job.tmp.iterdir()) == []


SLOW = """
import time
from pathlib import Path

from aligner.algorithms.grpo import GrpoConfig, grpo


def loop(roles, prompts, cfg: GrpoConfig):
    for step, result in enumerate(grpo(roles, prompts, cfg), start=1):
        if step == 2:
            Path("sleeping").touch()
            time.sleep(600)
        yield result
"""


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("after", [1.0, 6.0, 12.0])
def test_a_signal_before_the_first_step(number: signal.Signals, after: float, task: Task, tmp_path: Path) -> None:
    """In imports, while models are built, or wherever a busy machine is by then: a line or two, and nothing is left."""
    run_dir = tmp_path / "run"
    job = Running(LAUNCHER, tmp_path, [*task.overrides(run_dir), *LONG])
    time.sleep(after)
    os.killpg(job.process.pid, number)
    status, said = job.ended(60)
    stepped_by_then = stepped(run_dir, 1)()
    assert status == (0 if stepped_by_then else 128 + number), said
    assert "Traceback" not in said and len(said.splitlines()) < 5, said
    assert list(job.tmp.iterdir()) == []


@pytest.mark.matrix
def test_an_error_leaves_nothing_and_its_status_is_the_jobs(task: Task, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def rule(prompt, response, **fields):\n    raise KeyError('x')\n")
    job = Running(LAUNCHER, tmp_path, [*task.overrides(tmp_path / "run"), *LONG, "reward.rule=wrong.py:rule"])
    status, said = job.ended(120)
    assert status == 1 and "have no reward" in said and "ChildFailedError" not in said
    assert list(job.tmp.iterdir()) == []
    again = tmp_path / "again"
    again.mkdir()
    job = Running(LAUNCHER, again, [*task.overrides(again / "run"), "policy.optimizer.lr=fast"])
    status, said = job.ended(120)
    assert status == 2 and len(said.splitlines()) == 2, said
    assert said.startswith("aligner: error: policy.optimizer.lr=fast") and "rank 0 ended with status 2" in said
    assert list(job.tmp.iterdir()) == []
