"""Whether a job may go on from the checkpoint that its folder holds: the same settings, rows, models, rules and loop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.checkpoint.claim import FOLDER, Start, how_to_start
from aligner.checkpoint.folder import STATE, complete, read_json
from aligner.config.changes import check_changes

if TYPE_CHECKING:
    from aligner.config.schema import Config


def check_resumed(config: Config, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """The first rank, before models are built: what would stop a run from going on, as far as it can be seen now.

    Args:
        settings: the configuration as JSON.
        inputs: digests of what the job reads.

    Raises:
        ValueError: the newest checkpoint is of other settings, or of other rows, models, rules or another loop.
    """
    run_dir = Path(config.run_dir)
    if how_to_start(run_dir, config.checkpoint, config.overwrite, config.train.steps) is Start.RESUME:
        try:
            state = read_json(complete(run_dir / FOLDER)[0] / STATE)
        except (OSError, ValueError):
            return  # reported when checkpoints are verified
        compare(state, settings, inputs, config.checkpoint.accept_changes, say=False)


def compare(
    state: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str], accepted: bool, say: bool
) -> None:
    """A checkpoint's settings and inputs with this job's (see `check_changes`).

    Args:
        state: the checkpoint's state.json.
        settings: this job's configuration as JSON.
        inputs: this job's digests.
        accepted: changes are wanted.
        say: report what was accepted, and what cannot be compared.
    """
    before = state.get("inputs", {})
    check_changes(state["config"], settings, accepted, say, (before, inputs))
    if say and not before:
        sys.stderr.write(
            "aligner: the checkpoint is of an earlier version, which did not note its rows, models and rules: whether they "
            "are still the same is not checked.\n"
        )
