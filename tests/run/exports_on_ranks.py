"""What ranks do in the export tests: a policy over 2 tensor ranks, whose weights double before each step.

Rank 1 writes half of every model.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from aligner.checkpoint.claim import Start, claim
from aligner.config.schema import Config, compose_config, to_config
from aligner.roles.build import build_roles
from aligner.run.best import Best
from aligner.run.exports import Exports
from aligner.run.prepare import prepare
from aligner.spmd.world import World
from aligner.trainer.model_role import ModelRole

SCENES: dict[str, list[tuple[float | None, int | None]]] = {
    "steps": [
        (0.5, None),
        (None, None),
        (0.5, None),
        (0.75, None),
        (0.6, None),
        (None, None),
        (math.nan, None),
        (0.9, None),
    ],
    "full disk": [(0.5, None), (0.8, 4096), (0.7, None), (0.7, None), (0.9, 0)],
    "killed": [(0.5, None), (0.8, -4096)],
}
"""By step: the figure of an evaluation (None: there is none), and how many bytes of a file rank 1 can write. When it comes
to more it is told so; where the number is negative, both ranks are killed in the middle of their files."""


class Reader(threading.Thread):
    """Somebody who looks for a whole model under run_dir/best all the time."""

    def __init__(self, best: Path) -> None:
        super().__init__(daemon=True)
        self.best, self.looks, self.misses, self.done = best, 0, 0, threading.Event()

    def run(self) -> None:
        while not (self.best / "config.json").exists() and not self.done.is_set():
            pass
        while not self.done.is_set():
            self.looks += 1
            self.misses += not all((self.best / name).exists() for name in ("config.json", "best.json"))


def play(world: World, task: Path, out: Path, scene: str, overrides: list[str]) -> dict[str, Any]:
    """What this rank sees of a scene.

    Args:
        task: the tests' small task.
        out: the folder of the run.
        scene: one of SCENES; "none": no step; "again": no step of a run that goes on.
    """
    job = prepare(configured(task, out, overrides), world.size)
    checked = job.checked
    roles = build_roles(job.config, ["policy"], world, checked.meshes, checked.spec, checked.tokenizer)
    notes: list[str] = []
    best = Best(checked.best_metric) if checked.best_metric else None
    run = [claim(out, Start.RESUME if scene == "again" else Start.NEW) if world.rank == 0 else ""]
    dist.broadcast_object_list(run)
    exports = Exports(roles.main, out, job.config.train, best, notes.append, run[0])
    if scene != "again":
        exports.clear()
    reader = Reader(out / "best")
    if world.rank == 0:
        reader.start()
    seen = []
    for step, (value, room) in enumerate(SCENES.get(scene, [])):
        if step:
            double(roles.main)
        row = {"heldout_loss": -value} if world.rank == 0 and value is not None else {}
        with limited(room if room is not None and (world.rank == 1 or room < 0) else None):
            wrote = exports.after(step, row, value is not None)
        seen.append({"wrote": wrote, "step": best.step if best else None, **listing(out)})
    reader.done.set()
    return {
        "seen": seen,
        "notes": notes,
        "failed": exports.failed,
        "summary": exports.summary_lines(),
        "looks": reader.looks,
        "misses": reader.misses,
    }


def configured(task: Path, out: Path, overrides: list[str]) -> Config:
    settings = [
        "algorithm=sft", "data=demonstrations", f"model.path={task / 'model'}", f"run_dir={out}",
        f"data.path={task / 'demonstrations.jsonl'}", f"data.eval_path={task / 'demonstrations.jsonl'}",
        "data.max_tokens=64", "data.prompts_per_step=4", "placement.policy.tensor=2", "train.keep_best=true",
        "train.export_every=2", "train.export_keep=2", *overrides,
    ]  # fmt: skip
    return to_config(compose_config(settings, "quickstart"))


@contextmanager
def limited(room: int | None) -> Iterator[None]:
    """A file that grows beyond this is what a full disk is: the kernel says no, or ends the process (room < 0)."""
    if room is None:
        yield
        return
    before = signal.signal(signal.SIGXFSZ, signal.SIG_DFL if room < 0 else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (abs(room), resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, before)


def double(role: ModelRole) -> None:
    for piece in role.weights.pieces():
        role.weights.view(piece).mul_(2)


def listing(out: Path) -> dict[str, Any]:
    """What stands there, hidden things too."""
    files = {path.name for path in (out / "exports").iterdir()}
    link = out / "best"
    return {
        "exports": sorted(files),
        "best": str(link.readlink()) if link.is_symlink() else None,
        "figures": json.loads((link / "best.json").read_text()) if link.exists() else None,
    }
