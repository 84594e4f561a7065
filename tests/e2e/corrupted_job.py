"""A whole job of two ranks that a corrupted transfer ends.

Arguments: a folder for the checkpoint, a fault of `corruption_on_ranks`. A program of its own, since it is about how a job ends:
the report, who is blamed, the exit status.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from aligner.spmd.world import World
from tests.e2e.corruption_on_ranks import FAULTS, Job


def main() -> None:
    world = World(timeout_seconds=120)
    try:
        job = Job(world, Path(sys.argv[1]) / "model")
        job.step()
        job.syncs["whole"].run()
        job.step()
        with FAULTS[sys.argv[2]](job, "whole"):
            job.syncs["whole"].run()
        dist.barrier()  # the peers' next step, whatever it is
    except BaseException as error:
        world.fail(error)
    world.leave()


if __name__ == "__main__":
    main()
