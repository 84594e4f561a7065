"""What ranks do in the tests of collectives on CPUs."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from aligner.spmd import cpu_collectives
from aligner.spmd.cpu_collectives import CpuCollectives
from aligner.spmd.world import World
from aligner.trainer.fsdp.collectives import use_cpu_collectives


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
        parts = whole.view(len(members), part)
        apart = torch.full((part,), 7).to(whole.dtype)
        made.reduce_scatter([[each] for each in parts], [apart])
        untouched = torch.equal(whole, numbers(world.rank, part * len(members), dtype))
        made.reduce_scatter([[each] for each in parts], [parts[place]])
        gathered = torch.zeros_like(parts)
        gathered[place] = numbers(world.rank, part, dtype)
        made.all_gather([gathered[place]], [gathered])
    return {
        "apart": apart.tolist(),
        "within": parts[place].tolist(),
        "untouched": untouched,
        "gathered": gathered.flatten().tolist(),
    }


def lists(world: World, shared: bool, lengths: list[int]) -> tuple[list[list[float]], list[list[float]]]:
    """Several tensors at once: gathered, of these lengths; and summed, where each rank has one element more than the one before."""
    made = collectives(world, tuple(range(world.size)), shared)
    assert made is not None
    with patch.object(cpu_collectives, "CHUNK_BYTES", 64):
        wholes = [torch.zeros(world.size, length) for length in lengths]
        made.all_gather([numbers(world.rank + length, length, "float32") for length in lengths], wholes)
        parts = [
            [numbers(length, length + rank, "bfloat16") * (world.rank + 1) for length in lengths]
            for rank in range(world.size)
        ]
        out = [torch.full((length + world.rank,), 7.0) for length in lengths]  # sums of bfloat16 in float32
        made.reduce_scatter(parts, out)
    return [whole.flatten().tolist() for whole in wholes], [total.tolist() for total in out]


def through_fsdp(world: World, sizes: list[tuple[int, ...]], dtype: str) -> tuple[list[Any], list[Any]]:
    """What `fully_shard` gives with these collectives and without, of a module whose parameters have these sizes: gathered weights,
    and this rank's gradients where rank r's are (r + 1) times the weights."""
    found = []
    for custom in (True, False):
        module = nn.ParameterList([numbers(11 + number, 1, dtype).new_zeros(size) for number, size in enumerate(sizes)])
        for number, parameter in enumerate(module):
            parameter.data.copy_(numbers(number, parameter.numel(), dtype).view(parameter.shape))
        root = Summed(module)
        mesh = init_device_mesh("cpu", (world.size,))
        fully_shard(root, mesh=mesh)
        root.set_gradient_divide_factor(1.0)
        root.set_force_sum_reduction_for_comms(True)
        if custom:
            made = world.cpu_collectives(mesh.get_group())
            assert made is not None
            use_cpu_collectives(root, made)
        seen: list[Any] = []
        root(seen, float(world.rank + 1)).backward()
        gradients = [parameter.grad.to_local().tolist() for parameter in module]
        found.append((seen, gradients))
    assert found[0] == found[1]
    return found[0]


class Summed(nn.Module):
    """Half the sum of squares of its parameters."""

    def __init__(self, weights: nn.ParameterList) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, seen: list[Any], factor: float) -> Tensor:
        seen += [weight.tolist() for weight in self.weights]
        return factor * sum((weight.square().sum() / 2 for weight in self.weights), torch.zeros(()))
