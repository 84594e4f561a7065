"""The end of a job: what it leaves is whole before it says that it is finished, and weights are never lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import Task
from tests.e2e.test_durable import rows_of
from tests.e2e.test_leaving import TORCHRUN, Running
from tools.convert import main as convert

SFT = ["algorithm=sft", "data=demonstrations", "data.max_tokens=64", "data.eval_path=null", "train.steps=3",
       "checkpoint.every=0", "logging.console=false"]  # fmt: skip


def settings(task: Task, run_dir: Path) -> list[str]:
    given = [one for one in task.overrides(run_dir) if not one.startswith(("algorithm.", "data.", "reward."))]
    return [*given, *SFT, f"data.path={task.folder / 'demonstrations.jsonl'}", "data.prompts_per_step=4"]


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_weights_outlive_an_export_that_fails(task: Task, tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    """No checkpoint was asked for, and the model cannot be written: a checkpoint has it, the message says how to get it
    out, and the same command only exports."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".model.partial").touch()  # where the folder is made in which the model is written
    job = ["-m", "aligner.main", *settings(task, run_dir), "train.save=true"]
    done = torchrun(1, job)
    assert done.returncode != 0
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    assert f"{run_dir / 'model'} could not be written: FileExistsError" in done.stderr
    assert f"The weights are safe in {checkpoint}." in done.stderr
    assert f"python tools/convert.py {checkpoint / 'policy'} OTHER_FOLDER" in done.stderr
    assert json.loads((run_dir / ".launch").read_text())["finished"] is None
    assert convert([str(checkpoint / "policy"), str(tmp_path / "other")]) == 0
    (run_dir / ".model.partial").unlink()
    done = torchrun(1, job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(run_dir) == [1, 2, 3]
    assert weights(run_dir / "model") == weights(tmp_path / "other") != {}
    assert json.loads((run_dir / ".launch").read_text())["finished"] == 3


SLOW_DISK = """
import time
from pathlib import Path

from aligner.algorithms import sft as loops
from aligner.checkpoint import folder

real, here = folder.write_tensors, Path("{here}")


def slow(file, tensors, tick):
    if "step-00000004.partial/rank-00001" in str(file) and not (here / "quick").exists():
        (here / "writing").touch()
        time.sleep(600)
    return real(file, tensors, tick)


folder.write_tensors = slow
loop = loops.sft
"""


@pytest.mark.matrix
def test_a_launcher_that_is_killed_in_the_last_save(task: Task, tmp_path: Path) -> None:
    """Rank 1 is still writing: the run is not finished, and the same command goes on."""
    run_dir = tmp_path / "run"
    job = [*settings(task, run_dir), "algorithm._target_=slow_disk.loop", "checkpoint.every=2", "train.steps=4"]

    def start(name: str) -> Running:
        (tmp_path / name).mkdir()
        (tmp_path / name / "slow_disk.py").write_text(SLOW_DISK.format(here=tmp_path))
        return Running(TORCHRUN, tmp_path / name, job)

    first = start("first")
    first.until((tmp_path / "writing").exists)
    time.sleep(1)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    (tmp_path / "quick").touch()
    status, said = start("second").ended(200)  # at once, while ranks of the first may still be there
    assert status == 0, said
    assert "going on after step 2" in said
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    assert rows_of(run_dir) == [1, 2, 3, 4]
    status, said = start("third").ended(200)
    assert status and "finished train.steps=4" in said
