"""One rank of the export tests: a policy over 2 tensor ranks, whose weights double before each step.

Arguments: the tests' small task, a folder to write to, a scene. Rank 1 writes half of every model.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

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
        while not (self.best / "config.json").exists():
            pass
        while not self.done.is_set():
            self.looks += 1
            self.misses += not all((self.best / name).exists() for name in ("config.json", "best.json"))


def main() -> None:
    task, out, scene = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    world = World(60)
    job = prepare(configured(task, out, sys.argv[4:]), world.size)
    checked = job.checked
    roles = build_roles(job.config, ["policy"], world, checked.meshes, checked.spec, checked.tokenizer)
    notes: list[str] = []
    best = Best(checked.best_metric) if checked.best_metric else None
    exports = Exports(roles.main, out, job.config.train, best, notes.append)
    if scene != "again":
        exports.clear()
    reader = Reader(out / "best")
    if world.rank == 0:
        reader.start()
    seen = []
    for step, (value, room) in enumerate(SCENES.get(scene, [])):
        if step:
            double(roles.main)
        limited = room is not None and (world.rank == 1 or room < 0)
        if room is not None and limited:
            limit(room)
        row = {"heldout_loss": -value} if world.rank == 0 and value is not None else {}
        wrote = exports.after(step, row, value is not None)
        if limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        seen.append({"wrote": wrote, "step": best.step if best else None, **listing(out)})
    reader.done.set()
    found = {"seen": seen, "notes": notes, "failed": exports.failed, "told": exports.summary_lines()}
    (out / f"rank{world.rank}.json").write_text(json.dumps(found | {"looks": reader.looks, "misses": reader.misses}))
    world.leave()


def configured(task: Path, out: Path, overrides: list[str]) -> Config:
    settings = [
        "algorithm=sft", "data=demonstrations", f"model.path={task / 'model'}", f"run_dir={out}",
        f"data.path={task / 'demonstrations.jsonl'}", f"data.eval_path={task / 'demonstrations.jsonl'}",
        "data.max_tokens=64", "data.prompts_per_step=4", "placement.policy.tensor=2", "train.keep_best=true",
        "train.export_every=2", "train.export_keep=2", *overrides,
    ]  # fmt: skip
    return to_config(compose_config(settings, "quickstart"))


def limit(room: int) -> None:
    """A file that grows beyond this is what a full disk is: the kernel says no, or ends the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if room < 0 else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (abs(room), resource.RLIM_INFINITY))


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


if __name__ == "__main__":
    main()
