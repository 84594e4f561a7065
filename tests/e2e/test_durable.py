"""Whole jobs that are asked to leave, that find damage, or a full disk: nothing is lost that was saved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.conftest import ROOT
from tests.e2e.conftest import Task

CALM = ["train.steps=6", "checkpoint.every=2", "logging.console=false"]


def command(task: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return [*launcher, "-m", "aligner.main", *overrides]


def rows_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.matrix), signal.SIGUSR1])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    number: signal.Signals, task: Task, tmp_path: Path, torchrun: Callable[..., Any]
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*task.overrides(run_dir), *CALM, "train.steps=500", "checkpoint.every=0"]
    options = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # as launch/slurm.sbatch has it
    process = fork_server.Popen(
        command(task.folder, *overrides, options=options), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or len(rows_of(run_dir)) < 2:
            assert time.monotonic() < end and process.poll() is None, process.communicate(timeout=5)
            time.sleep(0.1)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    steps = rows_of(run_dir)
    assert f"{number.name}: saved after step {steps[-1]}; the same command goes on from there" in said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]
    more = steps[-1] + 2
    done = torchrun(2, ["-m", "aligner.main", *overrides, f"train.steps={more}", "checkpoint.accept_changes=true"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on after step {steps[-1]}" in done.stderr and f"train.steps: 500 -> {more}" in done.stderr
    assert rows_of(run_dir) == list(range(1, more + 1))


def test_what_stands_in_the_way_of_going_on_is_said(task: Task, tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    run_dir = tmp_path / "run"
    base = ["-m", "aligner.main", *task.overrides(run_dir), *CALM]

    def job(*overrides: str) -> tuple[int, str]:
        done = torchrun(2, [*base, *overrides])
        return done.returncode, done.stdout + done.stderr

    def first_rank(*overrides: str) -> tuple[int, str]:
        """Of a job that is refused before the world starts, by each rank alone (`test_bad_inputs.py`)."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2"}
        program = [sys.executable, *base, *overrides]
        done = fork_server.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=100)
        return done.returncode, done.stdout + done.stderr

    status, said = job()
    assert status == 0, said[-3000:]
    status, said = first_rank()
    assert status == 2 and "already holds a run, which finished train.steps=6" in said
    status, said = first_rank("train.steps=7", "policy.optimizer.lr=1e-5")
    assert status == 2 and "policy.optimizer.lr: " in said and " -> 1e-05" in said and "train.steps: 6 -> 7" in said
    assert "checkpoint.accept_changes=true" in said and rows_of(run_dir) == [1, 2, 3, 4, 5, 6]
    newest = run_dir / "checkpoints" / "step-00000006" / "rank-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    accepted = ("train.steps=7", "checkpoint.accept_changes=true")
    status, said = job(*accepted)
    assert status == 0, said[-3000:]
    assert f"{newest} is damaged" in said and "going on after step 4" in said
    assert rows_of(run_dir) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small disk of its own needs unshare of util-linux")
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(task: Task, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    job = command(task.folder, *task.overrides(run_dir), *CALM)
    # room for one checkpoint of 1.3 MB and a part of the next: the old one stays until the new one is whole
    mounted = ["sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && "$@" && ls "$0"', str(run_dir / "checkpoints"), *job]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", *mounted], text=True, capture_output=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if "unshare failed" in done.stderr or "mount: " in done.stderr:
        pytest.skip(f"this machine makes no small disk: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING: the checkpoint of step 4 could not be written" in done.stderr
    assert "No space left on device" in done.stderr and "last complete checkpoint is step-00000002" in done.stderr
    assert rows_of(run_dir) == [1, 2, 3, 4, 5, 6]
    assert done.stdout.split() == ["step-00000002"]
