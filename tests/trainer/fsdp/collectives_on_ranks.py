"""What ranks do in the tests of FSDP's collectives on CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from aligner.spmd.world import World
from aligner.trainer.fsdp.collectives import AllGather, ReduceScatter


def gathered(world: World, members: tuple[int, ...], numbers: int) -> list[float]:
    """The parts of all `members`, each of which has 10 x rank + [0, 1, 2, ...] as bfloat16; empty elsewhere."""
    group = world.group(members)
    if world.rank not in members:
        return []
    gather = AllGather()
    whole = gather.allocate((numbers * len(members),), dtype=torch.bfloat16, device=torch.device("cpu"))
    own = whole.view(len(members), numbers)[members.index(world.rank)]
    own.copy_(10 * world.rank + torch.arange(numbers))
    gather(whole, own, group)
    return whole.tolist()


def reduced(world: World, members: tuple[int, ...], numbers: int) -> list[float]:
    """This rank's part of the sum over `members` of (rank + 1) x [0, 1, 2, ...]; empty elsewhere."""
    group = world.group(members)
    if world.rank not in members:
        return []
    scatter = ReduceScatter()
    device = torch.device("cpu")
    whole = scatter.allocate((numbers * len(members),), dtype=torch.float32, device=device)
    part = scatter.allocate((numbers,), dtype=torch.float32, device=device)
    torch.mul(torch.arange(float(len(whole))), world.rank + 1, out=whole)
    scatter(part, whole, group, dist.ReduceOp.SUM)
    assert whole.untyped_storage().nbytes() == 0
    return part.tolist()
