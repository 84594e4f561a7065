"""What ranks do in the executor's tests: one transfer, of which every element is compared, or one that something breaks.

Messages go over gloo or in shared memory. The buffers of each way are kept between all transfers, of whatever sizes, also of
those that fail.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.reshard.local import TensorWeights
from aligner.reshard.message.bucket import Buffers
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.region import Layout, Piece, whole_tensor
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.spmd.shared_memory import connect
from aligner.spmd.world import World
from aligner.trainer.fsdp.layout import shard_rows
from tests.reshard.layouts import Grid, Shapes, parts, scattered

CPU = torch.device("cpu")
SHAPES: Shapes = {f"layer{n}.{name}": shape for n in range(4) for name, shape in {"w": (24, 20), "b": (7,)}.items()}
SHAPES = {**SHAPES, "cube": (3, 5, 4), "scale": (), "embedding": (100, 16)}
SMALL: Shapes = {"a.weight": (6, 8), "b.weight": (6, 8), "c.bias": (9,)}
WHOLE = [whole_tensor(name, shape, "float32") for name, shape in SMALL.items()]
HALVES = [Piece(p.name, p.lo, p.size, f"engine.{p.name}", 0, p.stride, "bfloat16") for p in WHOLE]
Sides = tuple[Mapping[int, Layout], Mapping[int, Layout]]
"""Rank -> what it holds, rank -> what it is to have."""


@functools.cache
def buffers(world: World, way: str) -> Buffers:
    if way == "gloo":
        return Buffers(CPU)
    channel = connect(dist.group.WORLD, "reshard")
    assert channel, "these ranks are on one host"
    return Buffers(CPU, channel)


def values(shapes: Shapes) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(number))
        for number, (name, shape) in enumerate(shapes.items())
    }


def inside(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))


class Transfer:
    """Storages of one transfer on this rank."""

    def __init__(self, world: World, way: str, shapes: Shapes, sides: Sides) -> None:
        sources, destinations = sides
        self.plan, self.buffers = plan_transfer(world.rank, sources, destinations), buffers(world, way)
        from_dtype = next(piece.dtype for layout in sources.values() for piece in layout)
        self.values = {name: value.to(getattr(torch, from_dtype)) for name, value in values(shapes).items()}
        self.held = allocate(sources.get(world.rank, []), CPU)
        for piece in sources.get(world.rank, []):
            strided_view(self.held[piece.storage], piece).copy_(self.values[piece.name][inside(piece)])
        self.wanted = destinations.get(world.rank, [])
        self.filled = allocate(self.wanted, CPU)

    def source(self, piece: Piece) -> Tensor:
        return strided_view(self.held[piece.storage], piece)

    def run(
        self, bucket_bytes: int, verify: bool = True, destination: Any = None, group: Any = None
    ) -> dict[str, float]:
        """Execute, and compare every destination piece with the tensor it should hold, bit by bit."""
        to = destination or (TensorWeights(self.filled, self.wanted) if self.wanted else None)
        row = execute(
            self.plan, self.source, to, group or dist.group.WORLD, CPU, bucket_bytes, verify, buffers=self.buffers
        )
        for piece in self.wanted:
            expected = self.values[piece.name][inside(piece)].to(getattr(torch, piece.dtype))
            assert torch.equal(strided_view(self.filled[piece.storage], piece), expected), piece
        return row.metrics()

    def error(self, destination: Any = None) -> str:
        """Why it failed on this rank; "" where it did not."""
        try:
            self.run(1 << 20, destination=destination)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def disjoint(size: int, draw: random.Random) -> Sides:
    half = size // 2
    to = Grid(range(half, size), 1, 1, "float32").layouts(SHAPES, draw)
    return Grid(range(half), half, 1).layouts(SHAPES, draw), to


def colocated(size: int, draw: random.Random) -> Sides:
    half, everyone = size // 2, range(size)
    return Grid(everyone, half, 2).layouts(SHAPES, draw), Grid(everyone, half, 1, "bfloat16").layouts(SHAPES, draw)


def anything(size: int, draw: random.Random) -> Sides:
    everyone = range(size)
    return scattered(SHAPES, everyone, "float32", draw, 2), parts(SHAPES, everyone, "bfloat16", draw)


def everything(dtype: str) -> Layout:
    return [whole_tensor(name, shape, dtype) for name, shape in SHAPES.items()]


def to_one_other(size: int, draw: random.Random) -> Sides:
    return {0: everything("float32")}, {1: everything("float32")}


def to_itself(size: int, draw: random.Random) -> Sides:
    return {0: everything("float32")}, {0: Grid([0], 1, 1, "bfloat16").layouts(SHAPES, draw)[0]}


def widened(size: int, draw: random.Random) -> Sides:
    return {0: everything("bfloat16")}, {1: everything("float32")}


def of_rows(to_dtype: str) -> Callable[[int, random.Random], Sides]:
    """As fully sharded data parallelism cuts it, the last shards with fewer rows or none, to all of it on every rank."""

    def sides(size: int, draw: random.Random) -> Sides:
        held: dict[int, list[Piece]] = {rank: [] for rank in range(size)}
        for piece in everything("float32"):
            rows = piece.size[0] if piece.size else 1
            for rank in range(size):
                taken = shard_rows(rows, size, rank)
                if piece.size and taken:
                    part = piece.crop((taken.start, *piece.lo[1:]), (len(taken), *piece.size[1:]))
                    held[rank].append(replace(part, offset=0))
                elif not piece.size:
                    held[rank].append(piece)
        return held, dict.fromkeys(range(size), everything(to_dtype))

    return sides


def of_stages(size: int, draw: random.Random) -> Sides:
    """Whole tensors, a stretch of them on each rank."""
    whole = everything("float32")
    held = {rank: whole[len(whole) * rank // size : len(whole) * (rank + 1) // size] for rank in range(size)}
    return held, dict.fromkeys(range(size), whole)


def of_experts(size: int, draw: random.Random) -> Sides:
    """Whole tensors, dealt out in turn."""
    whole = everything("float32")
    return {rank: whole[rank::size] for rank in range(size)}, dict.fromkeys(range(size), whole)


LAYOUTS: dict[str, Callable[[int, random.Random], Sides]] = {
    "rows": of_rows("float32"),
    "rows, narrower": of_rows("bfloat16"),
    "stages": of_stages,
    "experts": of_experts,
    "disjoint": disjoint,
    "colocated": colocated,
    "anything": anything,
    "rank 0 to rank 1": to_one_other,
    "rank 0 to itself": to_itself,
    "rank 0 to rank 1, wider": widened,
}


def transfer(world: World, way: str, layout: str, bucket_bytes: int, verify: bool = True) -> dict[str, float]:
    """The statistics of one transfer that has been compared."""
    sides = LAYOUTS[layout](world.size, random.Random(f"{layout} {bucket_bytes}"))
    return Transfer(world, way, SHAPES, sides).run(bucket_bytes, verify)


def transfer_in_a_group(world: World, way: str) -> dict[str, float]:
    """From rank 3 to rank 1 in their own group: ranks of the plan are the world's."""
    pair = world.group((1, 3))
    sides = {3: everything("float32")}, {1: everything("float32")}
    return Transfer(world, way, SHAPES, sides).run(500, group=pair or dist.GroupMember.NON_GROUP_MEMBER)


class Harmed(TensorWeights):
    """A destination that goes wrong in one tensor: looked up again for the proof, it is not what was written."""

    def __init__(self, transfer: Transfer, name: str, harm: Callable[[Tensor], Tensor]) -> None:
        super().__init__(transfer.filled, transfer.wanted)
        self._transfer, self._name, self._harm, self._reads = transfer, name, harm, 0

    def view(self, piece: Piece) -> Tensor:
        view = super().view(piece)
        self._reads += piece.name == self._name
        if piece.name != self._name or self._reads == 1:
            return view
        return self._harm(self._transfer.values[piece.name][inside(piece)].to(view.dtype))


class Exchanged(TensorWeights):
    """Two tensors of one shape are exchanged in the engine after they were written."""

    OTHER = {"engine.a.weight": "engine.b.weight", "engine.b.weight": "engine.a.weight"}  # noqa: RUF012

    def __init__(self, transfer: Transfer) -> None:
        super().__init__(transfer.filled, transfer.wanted)
        self._filled, self._written = transfer.filled, set[str]()

    def view(self, piece: Piece) -> Tensor:
        again = piece.storage in self._written
        self._written.add(piece.storage)
        return strided_view(
            self._filled[self.OTHER.get(piece.storage, piece.storage) if again else piece.storage], piece
        )


def stale(right: Tensor) -> Tensor:
    """The write went to a copy, as when an engine keeps a packed one."""
    return torch.zeros_like(right)


def flipped(right: Tensor) -> Tensor:
    """One bit of the storage changed."""
    right.view(torch.int16 if right.element_size() == 2 else torch.int32)[-1:, -1:] ^= 1
    return right


def swapped(right: Tensor) -> Tensor:
    """Rows changed places."""
    return right.flip(0)


HARMS = {"stale": stale, "flipped": flipped, "swapped": swapped}


def harmed(world: World, way: str, harm: str, to: int) -> str:
    """Rank 0 sends to rank `to`, itself or another, where one tensor goes wrong."""
    one = Transfer(world, way, SMALL, ({0: WHOLE}, {to: HALVES}))
    return one.error(Harmed(one, "b.weight", HARMS[harm]) if world.rank == to else None)


def exchanged(world: World, way: str) -> str:
    one = Transfer(world, way, SMALL, ({0: WHOLE}, {1: HALVES}))
    return one.error(Exchanged(one) if world.rank == 1 else None)


def unreadable(world: World, way: str, readers: list[int]) -> str:
    """Rank 0, which sends to `readers`, has lost a tensor."""
    one = Transfer(world, way, SMALL, ({0: WHOLE}, dict.fromkeys(readers, HALVES)))
    if world.rank == 0:
        del one.held["b.weight"]
    return one.error()


def incomplete(world: World, way: str) -> str:
    """Rank 1 says that it has one piece more than the plan knows."""
    one = Transfer(world, way, SMALL, ({0: WHOLE}, {1: HALVES}))
    more = [*HALVES, Piece("a.weight", (0, 0), (6, 8), "engine.more", 0, (8, 1), "bfloat16")]
    return one.error(TensorWeights(one.filled, more) if world.rank == 1 else None)
