"""What ranks do in the tests of random transfers: one among 2 to 8 of them, over gloo or in shared memory."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.reshard.local import TensorWeights
from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.region import Layout, Piece
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.sync import exchange_layouts
from aligner.reshard.transfer import executor, rank_transfer
from aligner.spmd.shared_memory import SharedMemoryChannel, connect
from aligner.spmd.world import World
from tests.reshard.layouts import Grid, Shapes, parts, scattered

CPU = torch.device("cpu")


class Watched(Buffers):
    """Buffers that know the most messages, and bytes of payload, that were out at once."""

    most = most_bytes = 0
    apart = math.inf

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.large_bytes = Watched.apart
        self._out: dict[int, int] = {}

    def take(self, words: int) -> Tensor:
        buffer = super().take(words)
        self._out[buffer.data_ptr()] = 0
        Watched.most = max(Watched.most, len(self._out))
        return buffer

    def give(self, bucket: Bucket) -> None:
        del self._out[bucket.buffer.data_ptr()]
        super().give(bucket)

    def hold(self, bucket: Bucket) -> None:
        self._out[bucket.buffer.data_ptr()] = sum(item.bytes for item in bucket.items)
        Watched.most_bytes = max(Watched.most_bytes, sum(self._out.values()))


class WatchedBucket(Bucket):
    def __init__(self, items: Any, buffers: Watched, buffer: Tensor | None = None) -> None:
        super().__init__(items, buffers, buffer)
        buffers.hold(self)


def layouts(draw: random.Random, world: int, shapes: Shapes) -> tuple[dict[int, Layout], dict[int, Layout]]:
    """Roles of any form on any ranks: grids with replicas, or boxes cut and dealt at random."""

    def ranks(count: int) -> list[int]:
        return draw.sample(range(world), count)

    tensor, pipeline = draw.choice([cut for cut in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1)) if math.prod(cut) <= world])
    copies, to_tensor = draw.randrange(1, world // (tensor * pipeline) + 1), draw.choice([1, 1, 2])
    source = Grid(ranks(tensor * pipeline * copies), tensor, pipeline, draw.choice(["float32", "bfloat16"]))
    to = Grid(ranks(to_tensor * (world // to_tensor)), to_tensor, 1, draw.choice(["float32", "bfloat16", "float16"]))
    free = scattered(shapes, ranks(draw.randrange(1, world)), "float32 bfloat16", draw, 2)
    pieces = parts(shapes, ranks(draw.randrange(1, world)), "float32 float16", draw)
    return (
        source.layouts(shapes, draw) if draw.random() < 0.6 else free,
        to.layouts(shapes, draw) if draw.random() < 0.7 else pieces,
    )


def inside(values: dict[str, Tensor], piece: Piece) -> Tensor:
    return values[piece.name][tuple(slice(low, low + n) for low, n in zip(piece.lo, piece.size, strict=True))]


def transfer(world: World, number: int) -> dict[str, float]:
    """Run one case among the first few ranks, and compare every element."""
    rank, draw = world.rank, random.Random(number)
    shapes = {f"layer{n}.w": tuple(draw.randrange(1, 25) for _ in range(draw.randrange(1, 4))) for n in range(1, 6)}
    sources, destinations = layouts(draw, 2 + number % (world.size - 1), shapes)
    # Small whole numbers are the same in every data type, so any of the holders may be asked.
    values = {name: torch.arange(torch.Size(shape).numel()).view(shape) % 251 for name, shape in shapes.items()}
    bucket_bytes = draw.choice([24, 150, 1500, 1 << 20])
    held, wanted = allocate(sources.get(rank, []), CPU), destinations.get(rank, [])
    filled = allocate(wanted, CPU)
    for piece in sources.get(rank, []):
        strided_view(held[piece.storage], piece).copy_(inside(values, piece))
    plan = plan_transfer(rank, sources, destinations)
    row = executor.execute(
        plan,
        lambda piece: strided_view(held[piece.storage], piece),
        TensorWeights(filled, wanted) if wanted else None,
        dist.group.WORLD,
        CPU,
        bucket_bytes,
    )
    for piece in wanted:
        assert torch.equal(strided_view(filled[piece.storage], piece).long(), inside(values, piece)), piece
    return {**row.metrics(), "limit": 2 * bucket_bytes}


def watched_transfer(world: World, number: int) -> dict[str, float]:
    """Over gloo, with large messages in buffers of their own or not; and the most that was staged."""
    Watched.most = Watched.most_bytes = 0
    Watched.apart = random.Random(-number).choice([0, 100, math.inf])
    with (
        patch.object(executor, "Buffers", Watched),
        patch.object(executor, "Bucket", WatchedBucket),
        patch.object(rank_transfer, "Bucket", WatchedBucket),
    ):
        row = transfer(world, number)
    return {**row, "messages": Watched.most, "staged": Watched.most_bytes}


@functools.cache
def channel_of(world: World) -> SharedMemoryChannel:
    channel = connect(dist.group.WORLD, "reshard")
    assert channel, "these ranks are on one host"
    return channel


def transfer_in_shared_memory(world: World, number: int) -> dict[str, float]:
    """One channel for all of them; and how many slots this rank has in it."""
    channel = channel_of(world)
    with patch.object(executor, "Buffers", functools.partial(Buffers, channel=channel)):
        row = transfer(world, number)
    return {**row, "slots": len(channel._slots)}


def exchange(world: World) -> list[bool]:
    """Layouts are told to all; those of replicas are one and the same list. The last rank holds nothing."""
    layouts = Grid(range(world.size - 1), 2, 1).layouts({"w": (8, 4), "b": (6,)}, random.Random(1))
    same = {number: [replace(piece) for piece in layouts[number % 2]] for number in layouts}
    exchanged = exchange_layouts(same.get(world.rank, []), range(world.size), dist.group.WORLD)
    equal = all(list(exchanged.layout(number)) == list(same.get(number, [])) for number in range(world.size))
    shared = len({id(exchanged.layout(number)) for number in exchanged.ranks}) == 2
    return [exchanged.ranks == tuple(range(world.size - 1)), equal, shared]
