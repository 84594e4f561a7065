"""Whether a job may go on from the checkpoint that its folder holds: the same settings, rows, models, rules and loop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.checkpoint.claim import FOLDER, Start, how_to_start
from aligner.checkpoint.folder import STATE, complete, read_json
from aligner.config.as_json import config_as_json
from aligner.config.changes import check_changes

if TYPE_CHECKING:
    from aligner.run.job import Job


def check_resumed(job: Job) -> None:
    """The first rank, before models are built: what would stop a run from going on, as far as it can be seen now.

    Raises:
        ValueError: the newest checkpoint is of other settings, or of other rows, models, rules or another loop.
    """
    run_dir, config = Path(job.config.run_dir), job.config.checkpoint
    if how_to_start(run_dir, config, job.config.overwrite, job.config.train.steps) is Start.RESUME:
        try:
            state = read_json(complete(run_dir / FOLDER)[0] / STATE)
        except (OSError, ValueError):
            return  # found again, and told, when checkpoints are verified
        compare(state, job, job.inputs, say=False)


def compare(state: Mapping[str, Any], job: Job, inputs: Mapping[str, str], say: bool) -> None:
    """A checkpoint's settings and inputs with this job's (see `check_changes`).

    Args:
        state: the checkpoint's state.json.
        inputs: this job's digests.
        say: report what was accepted, and what cannot be compared.
    """
    before = state.get("inputs", {})
    check_changes(state["config"], config_as_json(job), job.config.checkpoint.accept_changes, say, (before, inputs))
    if say and not before:
        sys.stderr.write(
            "aligner: the checkpoint is of an earlier version, which did not note its rows, models and rules: whether they "
            "are still the same is not checked.\n"
        )
