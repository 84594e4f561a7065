"""What differs between the configuration of a checkpoint and the one that is to go on from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

FREE = (
    "run_dir",
    "overwrite",
    "logging",
    "train",
    "placement",
    "residency",
    "checkpoint",
    "timeout_seconds",
    "reshard",
)
"""Sections that may change without a word: they decide where and how long, not what is computed."""
FIXED = ("model.path", "seed", "data")
"""Settings that a position in the data, or the sampled seeds, would mean something else under."""


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


def report_changes(before: Mapping[str, Any], after: Mapping[str, Any], say: bool) -> None:
    """Say on the console which settings have changed since the checkpoint, field by field.

    Raises:
        ValueError: one that cannot change in the middle of a run.
    """
    found = [change for change in changes(before, after) if change[0].partition(".")[0] not in FREE]
    stuck = [change for change in found if any(change[0] == key or change[0].startswith(f"{key}.") for key in FIXED)]
    if stuck:
        key, one, other = stuck[0]
        raise ValueError(
            f"{key}={other}, but the checkpoint in run_dir was made with {key}={one}, and a run cannot change it on its way: "
            "set it back, choose another run_dir, or set checkpoint.resume=false overwrite=true to start anew."
        )
    if found and say:
        lines = [f"  {key}: {one} -> {other}" for key, one, other in found]
        sys.stderr.write("aligner: going on with changed settings:\n" + "\n".join(lines) + "\n")
        sys.stderr.flush()
