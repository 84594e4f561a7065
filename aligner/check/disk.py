"""What a run writes: bytes by what they are, estimated before it starts, and the room there is for them (no torch)."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aligner.check.memory import STATE
from aligner.models.spec import ModelSpec
from aligner.models.tensors import parameter_count
from aligner.reshard.plan.region import ELEMENT_BYTES

if TYPE_CHECKING:
    from aligner.config.schema import Config

ROW = 4096
"""Bytes of a step's row in metrics.jsonl, and as many again for wandb."""
TOKEN = 8
"""Bytes of a token as text, in a file of samples."""
REPORT = 4 << 20
"""Bytes of the report and its pictures."""
CALLS = 32 << 10
"""Bytes of a rank's timeline of one step."""


def bytes_needed(
    config: Config, roles: Collection[str], specs: Mapping[str, ModelSpec], world_size: int
) -> dict[str, float]:
    """What the run will write under run_dir, in bytes, by what it is. Each thing that a run writes has its line here."""
    train, logging = config.train, config.logging
    files = 2 + train.steps // logging.samples_every if logging.samples_every else 0
    tokens = config.data.max_prompt_tokens + config.sampling.max_tokens
    learned = [role for role in specs if config.learns(role, roles)]
    models = {role: parameter_count(specs[role]) * ELEMENT_BYTES[config.settings(role).dtype] for role in learned}
    main = models[learned[0]] if learned else 0
    exports = train.steps // train.export_every if train.export_every else 0
    exports = min(exports, train.export_keep + 1) if train.export_keep else exports
    need = {
        "metrics": train.steps * ROW * (1 if logging.wandb == "off" else 2),
        "samples": files * logging.samples_count * tokens * TOKEN if {"rollout", "reward"} <= set(roles) else 0,
        "timeline": min(logging.timeline_steps, train.steps) * world_size * CALLS,
        "report": REPORT if train.report else 0,
        "exported model": sum(models.values()) if train.save else 0,
        # the last one goes when the new one is complete
        "exports": main * (exports + (2 if train.keep_best else 0)),
        "checkpoints": sum(parameter_count(specs[role]) for role in learned) * STATE * (config.checkpoint.keep + 1)
        if config.checkpoint.every
        else 0,
    }
    return {name: float(size) for name, size in need.items() if size}


def nearest_folder(path: str | Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(config: Config, need: Mapping[str, float]) -> None:
    """ValueError where run_dir's file system has less room than the run will need."""
    free = shutil.disk_usage(nearest_folder(config.run_dir)).free
    total = sum(need.values())
    if total > free:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in sorted(need.items(), key=lambda item: -item[1]))
        raise ValueError(
            f"run_dir={config.run_dir} is on a file system with {gib(free)} free, and the run will write about "
            f"{gib(total)} ({parts}); make room, choose another folder, or write less (train.save=false, a lower checkpoint.keep)."
        )


def gib(size: float) -> str:
    """A size as people read it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
