"""Several whole jobs, one after the other in the same processes; each leaves its metrics and checkpoints in its own run_dir.

Argument: a JSON file, a list of lists of overrides. The first job that fails ends the program, and its overrides are told. A
program of its own, since a run that goes on must find everything in its checkpoint: no rank may remember what trained it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from aligner.config.schema import compose_config, to_config
from aligner.run.loop import drive
from aligner.run.prepare import prepare
from aligner.spmd.residency import Residency
from aligner.spmd.world import World


def main() -> None:
    world = World(100)
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        job = prepare(to_config(compose_config(overrides, "quickstart")), world.size)
        world.residency = Residency(world.device)
        try:
            drive(job, world)
        except Exception as error:
            error.add_note(" ".join(overrides))
            world.fail(error)
        for close in reversed(world._closers):
            close()
        world._closers.clear()
        gc.collect()
    world.leave()


if __name__ == "__main__":
    main()
