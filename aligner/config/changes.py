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
    "rollout.share_policy_weights",
    "rollout.gpu_memory_utilization",
    "train.save",
    "train.report",
    "train.export_every",
    "train.export_keep",
    "train.keep_best",
    "train.best_metric",
)
"""What may change without a word: it decides where, how long and what is shown, not what is computed."""
ENGINE_SIZES = re.compile(r"models\.\w+\.(max_model_len|gpu_memory_utilization)")
"""The same settings as the rollout's, of further engines."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(setting, its value before, its value now) of every leaf that differs; a missing one is None."""
    changed = []
    for name in sorted({*before, *after}):
        old, new, key = before.get(name), after.get(name), f"{prefix}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += changes(old, new, f"{key}.")
        elif old != new:
            changed.append((key, old, new))
    return changed


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
    changed = [
        (key, old, new)
        for key, old, new in changes(before, after)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE) and not ENGINE_SIZES.fullmatch(key)
    ]
    changed += [
        (source, f"digest {old}", inputs[1][source])
        for source, old in inputs[0].items()
        if inputs[1].get(source, old) != old
    ]
    if not changed:
        return
    listing = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in changed)
    if not accepted:
        raise ValueError(
            f"run_dir has a checkpoint of a run with other settings or contents:\n{listing}\nSet them back, accept them with "
            "checkpoint.accept_changes=true, choose another run_dir, or start anew with overwrite=true."
        )
    if say:
        sys.stderr.write(f"aligner: going on with changed settings or contents:\n{listing}\n")
        sys.stderr.flush()
