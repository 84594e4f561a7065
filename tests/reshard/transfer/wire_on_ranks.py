"""What ranks do in the tests of deltas: transfers in a row that keep what they sent, each compared with tensors made by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.region import Layout, Piece, whole_tensor
from aligner.reshard.plan.schedule import make_schedule
from aligner.reshard.plan.transfer_plan import Item, plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.reshard.transfer.wire import LastMessages
from aligner.spmd.world import World
from tests.reshard.layouts import Grid, Shapes, parts, scattered

CPU = torch.device("cpu")
SHAPES: Shapes = {
    "embedding": (601, 48),
    "mlp.w": (130, 77),
    "mlp.b": (77,),
    "cube": (3, 5, 41),
    "scale": (),
    "odd": (7,),
}
LARGE = 1 << 20
Change = Callable[[Tensor, torch.Generator], None]
Sides = tuple[dict[int, Layout], dict[int, Layout]]


def negated(share: float) -> Change:
    """This share of the elements, at random, changes its sign: so it differs in any data type."""

    def change(value: Tensor, draw: torch.Generator) -> None:
        flat = value.view(-1)
        place = torch.randperm(flat.numel(), generator=draw)[: round(share * flat.numel())]
        flat[place] = -flat[place]

    return change


def special(value: Tensor, draw: torch.Generator) -> None:
    """NaNs and zeros appear."""
    flat = value.view(-1)
    place = torch.randperm(flat.numel(), generator=draw)[: flat.numel() // 20]
    flat[place[::2]], flat[place[1::2]] = torch.nan, 0.0


def unsigned(value: Tensor, draw: torch.Generator) -> None:
    """Each 0.0 becomes -0.0."""
    value[value == 0] = -0.0


CHANGES: dict[str, Change] = {
    "first": negated(0),
    "nothing": negated(0),
    "hundredth": negated(0.01),
    "third": negated(0.3),
    "everything": negated(1),
    "special": special,
    "special stays": negated(0),
    "negative zeros": unsigned,
    "all but a few": negated(0.97),
}


class Transfers:
    """One plan's storages on this rank, and what they should hold."""

    def __init__(self, rank: int, sides: Sides, bucket_bytes: int, verify: bool) -> None:
        sources, destinations = sides
        self.plan, self.bucket_bytes, self.verify = plan_transfer(rank, *sides), bucket_bytes, verify
        self.mine, self.wanted = sources.get(rank, []), destinations.get(rank, [])
        self.held, self.filled = allocate(self.mine, CPU), allocate(self.wanted, CPU)
        self.last_messages: LastMessages = {}
        draw = torch.Generator().manual_seed(3)
        self.values = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        self.before: list[Tensor] = []

    def run(self, change: Change, seed: int) -> dict[str, float]:
        """Change the values, transfer them, compare every element and the statistics with those made by hand."""
        draw = torch.Generator().manual_seed(seed)
        for value in self.values.values():
            change(value, draw)
        for piece in self.mine:
            strided_view(self.held[piece.storage], piece).copy_(self.values[piece.name][inside(piece)])
        row = execute(self.plan, self.source, self.destination(), dist.group.WORLD, CPU, self.bucket_bytes, self.verify, self.last_messages)  # fmt: skip
        expected = [self.values[piece.name][inside(piece)].to(dtype(piece), copy=True) for piece in self.wanted]
        for piece, value in zip(self.wanted, expected, strict=True):
            assert same(strided_view(self.filled[piece.storage], piece), value), piece
        entering = [self._entering(piece) for piece in self.wanted]
        least = sum(int(new.sum()) * now.itemsize for new, now in zip(entering, expected, strict=True))
        changed = least
        if self.before:
            each = zip(expected, self.before, entering, strict=True)
            changed = sum(int(((bits(now) != bits(old)) & new).sum()) * now.itemsize for now, old, new in each)
        assert (row.minimum_bytes, row.changed_bytes) == (least, changed), (row, least, changed)
        self.before = expected
        return {
            **row.metrics(),
            "kept": sum(kept.nbytes for kept in self.last_messages.values()),
            "passing": self.passing(),
        }

    def source(self, piece: Piece) -> Tensor:
        return strided_view(self.held[piece.storage], piece)

    def destination(self) -> TensorWeights | None:
        return TensorWeights(self.filled, self.wanted) if self.wanted else None

    def passing(self) -> int:
        """Bytes of all that this rank packs for others and of all that enters it, in whole words."""
        schedule = make_schedule(self.plan, 2 * self.bucket_bytes)
        found: dict[object, tuple[Item, ...]] = {}
        for step in schedule.steps:
            for message in step:
                if message and not (message.relay and message is step.send):
                    found[message.content] = schedule.items(message)
        return sum(-(-item.bytes // 8) * 8 for items in found.values() for item in items)

    def _entering(self, piece: Piece) -> Tensor:
        """Which elements of the piece this rank does not hold itself."""
        here = torch.zeros(SHAPES[piece.name], dtype=torch.bool)
        for other in self.mine:
            if other.name == piece.name:
                here[inside(other)] = True
        return ~here[inside(piece)]

    def error(self) -> str:
        try:
            execute(self.plan, self.source, self.destination(), dist.group.WORLD, CPU, self.bucket_bytes, True, self.last_messages)  # fmt: skip
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def inside(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))


def dtype(piece: Piece) -> torch.dtype:
    found: torch.dtype = getattr(torch, piece.dtype)
    return found


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int16 if value.itemsize == 2 else torch.int32)


def same(held: Tensor, expected: Tensor) -> bool:
    """Bit for bit; but which NaN a cast makes of a NaN depends on the code path."""
    cast = held.dtype != torch.float32
    return bool(((bits(held) == bits(expected)) | (cast & held.isnan() & expected.isnan())).all())


def whole(ranks: list[int], kind: str) -> dict[int, Layout]:
    return {rank: [whole_tensor(name, shape, kind) for name, shape in SHAPES.items()] for rank in ranks}


def layouts() -> dict[str, Sides]:
    draw = random.Random(1)
    everyone = range(4)
    mixed = [whole_tensor(name, shape, draw.choice(["float32", "bfloat16"])) for name, shape in SHAPES.items()]
    return {
        "relays": (whole([0], "float32"), whole([1, 2, 3], "bfloat16")),
        "relays, both data types": (whole([0], "float32"), dict.fromkeys((1, 2, 3), mixed)),
        "one to several without relays": (
            Grid([0, 1], 2, 1).layouts(SHAPES, draw),
            Grid([2, 3], 1, 1, "bfloat16").layouts(SHAPES, draw),
        ),
        "colocated": (
            Grid(everyone, 2, 2).layouts(SHAPES, draw),
            Grid(everyone, 2, 1, "bfloat16").layouts(SHAPES, draw),
        ),
        "anything": (
            scattered(SHAPES, everyone, "float32", draw, 2),
            parts(SHAPES, everyone, "float32 bfloat16", draw),
        ),
    }


def transfers(world: World, layout: str, bucket_bytes: int, verify: bool) -> dict[str, dict[str, float]]:
    """One after the other, after each of CHANGES: its statistics, and the bytes that are kept for the next."""
    transfers = Transfers(world.rank, layouts()[layout], bucket_bytes, verify)
    return {name: transfers.run(change, seed) for seed, (name, change) in enumerate(CHANGES.items())}


def unreadable(world: World) -> str:
    """The first transfer succeeds; in the second, rank 0 cannot read a tensor."""
    transfers = Transfers(world.rank, layouts()["relays"], LARGE, True)
    transfers.run(CHANGES["first"], 0)
    if world.rank == 0:
        transfers.held = {name: value for name, value in transfers.held.items() if name != "mlp.w"}
    return transfers.error()


def damaged(world: World) -> str:
    """One bit of what rank 2 kept changes between two transfers: what a delta makes of it is not what was sent."""
    transfers = Transfers(world.rank, layouts()["relays"], LARGE, True)
    transfers.run(CHANGES["first"], 0)
    if world.rank == 2:
        next(iter(transfers.last_messages.values()))[0] ^= 1
    return transfers.error()
