"""What ranks do in the tests of collectives on CPUs."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.spmd import cpu_collectives
from aligner.spmd.cpu_collectives import CpuCollectives
from aligner.spmd.world import World
from aligner.trainer.fsdp.collectives import AllGather, ReduceScatter


def numbers(rank: int, count: int, dtype: str) -> Tensor:
    """Whole numbers from -50 to 50, whose sums bfloat16 keeps exactly."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-50, 51, (count,), generator=generator).to(getattr(torch, dtype))


def collectives(world: World, members: tuple[int, ...], shared: bool) -> CpuCollectives | None:
    """Those of the members, by shared memory or by sends; None elsewhere."""
    group = world.group(members)
    if group is None:
        return None
    if not shared:
        with patch.object(cpu_collectives, "connect", lambda *_: None):
            return CpuCollectives(group)
    made = world.cpu_collectives(group)
    assert made is world.cpu_collectives(group), "one for a group"
    assert made is not None
    assert made._channel is not None, "these ranks are on one host"
    return made


def both(world: World, members: tuple[int, ...], shared: bool, part: int, dtype: str) -> dict[str, Any]:
    """Each member's parts of a reduce-scatter, in place and not, and of an all-gather; nothing elsewhere."""
    made = collectives(world, members, shared)
    if made is None:
        return {}
    place = members.index(world.rank)
    with patch.object(cpu_collectives, "CHUNK_BYTES", 64):
        whole = numbers(world.rank, part * len(members), dtype)
        apart = torch.full((part,), 7).to(whole.dtype)
        made.reduce_scatter(whole, apart)
        untouched = torch.equal(whole, numbers(world.rank, part * len(members), dtype))
        within = whole.view(len(members), part)[place]
        made.reduce_scatter(whole, within)
        gathered = torch.zeros_like(whole)
        gathered.view(len(members), part)[place] = numbers(world.rank, part, dtype)
        made.all_gather(gathered)
    return {
        "apart": apart.tolist(),
        "within": within.tolist(),
        "untouched": untouched,
        "gathered": gathered.tolist(),
    }


def through_fsdp(world: World) -> tuple[list[float], list[float]]:
    """What FSDP's hooks give, which take other arguments: two ranks' halves of [0, 1, 2, 3], and of the sum of two of these."""
    group = dist.group.WORLD
    assert group is not None
    made = collectives(world, (0, 1), True)
    assert made is not None
    gather, scatter, device = AllGather(made), ReduceScatter(made), torch.device("cpu")
    whole = gather.allocate((4,), dtype=torch.bfloat16, device=device)
    own = whole[2 * world.rank :][:2]
    own.copy_(2 * world.rank + torch.arange(2))
    gather(whole, own, group)
    part, gradients = scatter.allocate((2,), dtype=torch.float32, device=device), torch.arange(4.0)
    scatter(part, gradients, group, dist.ReduceOp.SUM)
    assert gradients.untyped_storage().nbytes() == 0
    return whole.tolist(), part.tolist()
