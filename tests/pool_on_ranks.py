"""What ranks do in the tests of the pool."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from aligner.spmd.world import World


def total(world: World, number: int) -> tuple[int, int, int]:
    """(this process, its rank, the sum over ranks of rank + number)."""
    value = torch.tensor([world.rank + number])
    dist.all_reduce(value)
    return os.getpid(), world.rank, int(value)


def fail(world: World, how: str) -> None:
    """On rank 1, while rank 0 waits for it."""
    print(f"rank {world.rank} is there", flush=True)
    if world.rank == 1:
        if how == "raises":
            raise ValueError("the mistake of rank 1")
        if how == "ends":
            os._exit(7)
        if how == "hangs":
            time.sleep(1000)
        return lambda: None  # type: ignore[return-value]  # cannot be pickled
    dist.barrier()
