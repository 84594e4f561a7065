"""Ownership of a run folder: decide whether a job starts a new run, resumes one, or must not touch the folder."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from enum import Enum
from pathlib import Path
from typing import Any

from aligner.checkpoint.config import CheckpointConfig
from aligner.checkpoint.folder import complete, remove, remove_leftovers, write_checksummed_json

FOLDER = "checkpoints"
CLAIM_FILE = ".launch"
METRICS_FILE = "metrics.jsonl"


class Start(Enum):
    """How a job starts in its run folder."""

    NEW = "new"
    RESUME = "resume"


def launch() -> str:
    """Id of this launch, the same for all its attempts (torchrun restarts, jobs requeued by Slurm)."""
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
    """Decide from the run folder whether to start a new run or to resume. Called by rank 0.

    Args:
        steps: train.steps.

    Raises:
        ValueError: the folder holds a run that may neither be replaced nor resumed.
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
            f"run_dir={run_dir} already holds a run, which finished train.steps={claim['finished']}; choose another "
            "folder, set overwrite=true, or raise train.steps to continue it."
        )
    if checkpoints and (config.resume or ours):
        return Start.RESUME
    if ours:
        return Start.NEW  # restarted before the first checkpoint
    raise ValueError(
        f"run_dir={run_dir} already holds a run without a checkpoint to resume; choose another folder or set overwrite=true."
        if not checkpoints
        else f"run_dir={run_dir} already holds a run, and checkpoint.resume=false; choose another folder, set overwrite=true, or "
        "checkpoint.resume=true."
    )


def run_id(run_dir: Path) -> str | None:
    """The run's id; "" for a run of an earlier version, which had none; None if there is no run."""
    claim = _read_claim(run_dir)
    return str(claim.get("run", "")) if claim else None


def claim(run_dir: Path, start: Start) -> str:
    """Claim the folder for this launch; called by rank 0 before anything is written. A new run removes the old checkpoints
    and metrics, and no other files.

    Returns:
        The run's id, which is the same for the lifetime of the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if start is Start.NEW:
        for folder in complete(run_dir / FOLDER):
            remove(folder)
        with contextlib.suppress(OSError):  # not empty: other files are kept
            (run_dir / FOLDER).rmdir()
        (run_dir / METRICS_FILE).unlink(missing_ok=True)
    remove_leftovers(run_dir / FOLDER)
    run = run_id(run_dir) or uuid.uuid4().hex
    _write_claim(run_dir, None, run)
    return run


def finish(run_dir: Path, steps: int) -> None:
    """Mark the run as finished after `steps`; called by rank 0 when everything is written."""
    _write_claim(run_dir, steps, run_id(run_dir) or "")


def _read_claim(run_dir: Path) -> dict[str, Any]:
    try:
        content = json.loads((run_dir / CLAIM_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_claim(run_dir: Path, finished: int | None, run: str) -> None:
    file = run_dir / CLAIM_FILE
    write_checksummed_json(
        file.with_name(f"{CLAIM_FILE}.partial"), {"launch": launch(), "finished": finished, "run": run}
    )
    os.replace(file.with_name(f"{CLAIM_FILE}.partial"), file)
