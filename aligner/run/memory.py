"""What the ranks of a job tell each other of their memory, so that `residency.mode=auto` decides the same on all of them."""

from __future__ import annotations

import os

from aligner.spmd.memory import available, keep_freed
from aligner.spmd.memory_account import MemoryAccount
from aligner.spmd.messages import all_gather
from aligner.spmd.residency_config import ResidencyConfig
from aligner.spmd.world import World


def open_account(world: World, config: ResidencyConfig) -> None:
    """Give `world.residency` its budget: the smallest of any rank. A collective of the world, before roles are built.

    Where nothing ever moves, freed memory is not given back either.
    """
    if config.mode == "off" and world.device.type == "cpu":
        keep_freed(True)
    if config.mode != "auto":
        return
    free = available(world.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    own = config.budget(free, world.device.type == "cpu")
    world.journal.enter("the memory of each rank")
    world.residency.account = MemoryAccount(min(all_gather(world, own, range(world.size))))
