"""Whose run a folder holds, from the first start to the last restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligner.checkpoint import claim as claims
from aligner.checkpoint.claim import Start, claim, finish, how_to_start
from aligner.checkpoint.config import CheckpointConfig


def start(run_dir: Path, overwrite: bool = False, resume: bool = True, steps: int = 10) -> Start:
    return how_to_start(run_dir, CheckpointConfig(resume=resume), overwrite, steps)


def trained(run_dir: Path, checkpoint: bool = True) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    if checkpoint:
        (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(claims, "launch", lambda: "first")
    return monkeypatch


def test_an_empty_folder_is_new(tmp_path: Path) -> None:
    assert start(tmp_path / "run") is Start.NEW
    assert start(tmp_path / "run", overwrite=True) is Start.NEW


def test_a_run_with_a_checkpoint_goes_on(tmp_path: Path) -> None:
    trained(tmp_path)
    assert start(tmp_path) is Start.RESUME
    with pytest.raises(ValueError, match=r"checkpoint\.resume=false"):
        start(tmp_path, resume=False)


def test_a_run_without_a_checkpoint_is_not_touched_but_by_its_own_launch(tmp_path: Path) -> None:
    claim(tmp_path, Start.NEW)
    trained(tmp_path, checkpoint=False)
    assert start(tmp_path) is Start.NEW, "a restart before the first checkpoint"
    (tmp_path / ".launch").write_text(json.dumps({"launch": "another", "finished": None}))
    with pytest.raises(ValueError, match="without a checkpoint to resume"):
        start(tmp_path)


def test_overwrite_removes_what_another_launch_has_left_and_keeps_its_own(
    tmp_path: Path, launches: pytest.MonkeyPatch
) -> None:
    claim(tmp_path, Start.NEW)
    trained(tmp_path)
    launches.setattr(claims, "launch", lambda: "second")
    assert start(tmp_path, overwrite=True) is Start.NEW
    claim(tmp_path, Start.NEW)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()
    trained(tmp_path)
    assert start(tmp_path, overwrite=True) is Start.RESUME, "a restart of the launch that overwrites"


def test_a_complete_run_goes_on_only_with_more_steps(tmp_path: Path, launches: pytest.MonkeyPatch) -> None:
    claim(tmp_path, Start.NEW)
    trained(tmp_path)
    finish(tmp_path, 10)
    assert start(tmp_path) is Start.RESUME, "killed after its end: the launcher must not see an error"
    launches.setattr(claims, "launch", lambda: "second")
    with pytest.raises(ValueError, match=r"finished train\.steps=10"):
        start(tmp_path)
    assert start(tmp_path, steps=20) is Start.RESUME


def test_a_requeued_job_is_the_same_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert real_launch() == "slurm 7.0"
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own = real_launch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert own.startswith("process ") and real_launch() != own, "torchrun's process, not the rank's"


real_launch = claims.launch
