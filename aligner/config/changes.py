"""What differs between the configuration of a checkpoint and the one that is to go on from it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

FREE = (
    "run_dir",
    "overwrite",
    "timeout_seconds",
    "logging",
    "checkpoint",
    "placement",
    "residency",
    "reshard",
    "guards",
    "mode",
    "check",
    "hang",
    "rollout.max_model_len",
    "train.save",
    "train.report",
    "train.export_every",
    "train.export_keep",
    "train.keep_best",
    "train.best_metric",
)
"""What may change without a word: it decides where, how long and what is shown, not what is computed."""
ENGINE_LENGTH = re.compile(r"models\.\w+\.max_model_len")
"""The same setting as rollout.max_model_len, of further engines."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any], at: str = "") -> list[tuple[str, Any, Any]]:
    """(setting, its value before, its value now) of every leaf that differs; a missing one is None."""
    found = []
    for name in sorted({*before, *after}):
        one, other, key = before.get(name), after.get(name), f"{at}{name}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += changes(one, other, f"{key}.")
        elif one != other:
            found.append((key, one, other))
    return found


def check_changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    accepted: bool,
    say: bool,
    inputs: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> None:
    """Compare the settings that decide what is computed, and the contents of what is read.

    Args:
        accepted: changes are wanted; they are reported, field by field.
        inputs: (before, after) of digests (see `inputs_of`); only what both have is compared.

    Raises:
        ValueError: there are changes that nobody has accepted; it lists them.
    """
    found = [
        (key, one, other)
        for key, one, other in changes(before, after)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE) and not ENGINE_LENGTH.fullmatch(key)
    ]
    found += [
        (what, f"digest {one}", inputs[1][what]) for what, one in inputs[0].items() if inputs[1].get(what, one) != one
    ]
    if not found:
        return
    told = "\n".join(f"  {key}: {one} -> {other}" for key, one, other in found)
    if not accepted:
        raise ValueError(
            f"run_dir has a checkpoint of a run with other settings or contents:\n{told}\nSet them back, accept them with "
            "checkpoint.accept_changes=true, choose another run_dir, or start anew with overwrite=true."
        )
    if say:
        sys.stderr.write(f"aligner: going on with changed settings or contents:\n{told}\n")
        sys.stderr.flush()
