"""Whose run a folder holds: this launch's, an earlier one's to go on with, or one that must not be touched."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from enum import Enum
from pathlib import Path
from typing import Any

from aligner.checkpoint.config import CheckpointConfig
from aligner.checkpoint.folder import complete, remove, sweep, write_json

FOLDER = "checkpoints"
CLAIM_FILE = ".launch"
METRICS_FILE = "metrics.jsonl"


class Start(Enum):
    """How a job begins in its folder."""

    NEW = "new"
    RESUME = "resume"


def launch() -> str:
    """What all attempts of one launch have in common: torchrun's restarts, and a job that Slurm queued again."""
    if (
        "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ
    ):  # a requeued script's steps have their numbers again
        return f"slurm {os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()  # torchrun's agent restarts ranks
    try:
        started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # no /proc
        started = ""
    return f"process {process} {started}"


def how_to_start(run_dir: Path, config: CheckpointConfig, overwrite: bool, steps: int) -> Start:
    """What the first rank finds.

    Raises:
        ValueError: the folder holds a run that is neither to be replaced nor to be continued.
    """
    claim = _read_claim(run_dir)
    checkpoints = complete(run_dir / FOLDER)
    if not checkpoints and not (run_dir / METRICS_FILE).exists():
        return Start.NEW
    ours = claim.get("launch") == launch()
    if overwrite and not ours:
        return Start.NEW
    if claim.get("finished") is not None and not ours and (not config.resume or steps <= claim["finished"]):
        raise ValueError(
            f"run_dir={run_dir} already holds a run, which ended after train.steps={claim['finished']}; choose another "
            "folder, set overwrite=true, or give more train.steps to go on with it."
        )
    if checkpoints and (config.resume or ours):
        return Start.RESUME
    if ours:
        return Start.NEW  # restarted before the first checkpoint
    raise ValueError(
        f"run_dir={run_dir} already holds a run, and no checkpoint to go on from; choose another folder or set overwrite=true."
        if not checkpoints
        else f"run_dir={run_dir} already holds a run, and checkpoint.resume=false; choose another folder, set overwrite=true, or "
        "checkpoint.resume=true."
    )


def run_id(run_dir: Path) -> str | None:
    """What marks folders as this run's; "" of a run of an earlier version, which had none; None where there is no run."""
    found = _read_claim(run_dir)
    return str(found.get("run", "")) if found else None


def claim(run_dir: Path, start: Start) -> str:
    """The first rank, before anything is written: this launch owns the folder; what a new run replaces is removed, which
    is checkpoints and metrics, and nothing else that lies beside them.

    Returns:
        The run's id, which stays as long as the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if start is Start.NEW:
        for folder in complete(run_dir / FOLDER):
            remove(folder)
        with contextlib.suppress(OSError):  # something else lies there
            (run_dir / FOLDER).rmdir()
        (run_dir / METRICS_FILE).unlink(missing_ok=True)
    sweep(run_dir / FOLDER)
    run = run_id(run_dir) or uuid.uuid4().hex
    _write_claim(run_dir, None, run)
    return run


def finish(run_dir: Path, steps: int) -> None:
    """The first rank, when everything is written."""
    _write_claim(run_dir, steps, run_id(run_dir) or "")


def _read_claim(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / CLAIM_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_claim(run_dir: Path, finished: int | None, run: str) -> None:
    file = run_dir / CLAIM_FILE
    write_json(file.with_name(f"{CLAIM_FILE}.partial"), {"launch": launch(), "finished": finished, "run": run})
    os.replace(file.with_name(f"{CLAIM_FILE}.partial"), file)
