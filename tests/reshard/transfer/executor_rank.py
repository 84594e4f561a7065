"""One rank of the executor's tests: carries out every case on real gloo ranks and reports what it saw."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
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
from aligner.reshard.transfer.shared_memory import connect
from tests.reshard.layouts import Grid, Shapes, parts, scattered
from tests.reshard.ranks import report, start_rank

CPU = torch.device("cpu")
BUFFERS = [Buffers(CPU)]
"""The last is kept between all transfers, of whatever sizes, also of those that fail."""
SHAPES: Shapes = {f"layer{n}.{name}": shape for n in range(4) for name, shape in {"w": (24, 20), "b": (7,)}.items()}
SHAPES = {**SHAPES, "cube": (3, 5, 4), "scale": (), "embedding": (100, 16)}


def values(shapes: Shapes) -> dict[str, Tensor]:
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        found[name] = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    return found


def inside(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))


class Case:
    """Storages of one transfer on this rank."""

    def __init__(
        self, rank: int, shapes: Shapes, sources: Mapping[int, Layout], destinations: Mapping[int, Layout]
    ) -> None:
        self.plan = plan_transfer(rank, sources, destinations)
        from_dtype = next(piece.dtype for layout in sources.values() for piece in layout)
        self.values = {name: value.to(getattr(torch, from_dtype)) for name, value in values(shapes).items()}
        self.held = allocate(sources.get(rank, []), CPU)
        for piece in sources.get(rank, []):
            strided_view(self.held[piece.storage], piece).copy_(self.values[piece.name][inside(piece)])
        self.wanted = destinations.get(rank, [])
        self.filled = allocate(self.wanted, CPU)

    def source(self, piece: Piece) -> Tensor:
        return strided_view(self.held[piece.storage], piece)

    def run(self, bucket_bytes: int, verify: bool = True, destination: Any = None, group: Any = None) -> dict[str, Any]:
        """Execute, and compare every destination piece with the tensor it should hold, bit by bit."""
        to = destination or (TensorWeights(self.filled, self.wanted) if self.wanted else None)
        row = execute(
            self.plan, self.source, to, group or dist.group.WORLD, CPU, bucket_bytes, verify, buffers=BUFFERS[-1]
        )
        for piece in self.wanted:
            expected = self.values[piece.name][inside(piece)].to(getattr(torch, piece.dtype))
            assert torch.equal(strided_view(self.filled[piece.storage], piece), expected), piece
        return row.metrics()

    def error(self, **arguments: Any) -> str:
        try:
            self.run(1 << 20, **arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


class Broken(TensorWeights):
    """A destination that goes wrong in one tensor: looked up again for the proof, it is not what was written."""

    def __init__(self, case: Case, name: str, harm: Callable[[Tensor], Tensor]) -> None:
        super().__init__(case.filled, case.wanted)
        self._case, self._name, self._harm, self._reads = case, name, harm, 0

    def view(self, piece: Piece) -> Tensor:
        view = super().view(piece)
        self._reads += piece.name == self._name
        if piece.name != self._name or self._reads == 1:
            return view
        return self._harm(self._case.values[piece.name][inside(piece)].to(view.dtype))


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


def good_cases(rank: int, world: int) -> dict[str, Any]:
    half = world // 2
    everyone, low, high = range(world), range(half), range(half, world)
    found: dict[str, Any] = {}

    def case(
        name: str, sources: Mapping[int, Layout], destinations: Mapping[int, Layout], size: int, verify: bool = True
    ) -> None:
        found[name] = Case(rank, SHAPES, sources, destinations).run(size, verify)

    for size in (100, 1 << 20):
        draw = random.Random(size)
        disjoint = Grid(low, half, 1).layouts(SHAPES, draw), Grid(high, 1, 1, "float32").layouts(SHAPES, draw)
        case(f"disjoint fp32 {size}", *disjoint, size)
        colocated = (
            Grid(everyone, half, 2).layouts(SHAPES, draw),
            Grid(everyone, world // 2, 1, "bfloat16").layouts(SHAPES, draw),
        )
        case(f"colocated bf16 {size}", *colocated, size)
        anything = scattered(SHAPES, everyone, "float32", draw, 2), parts(SHAPES, everyone, "bfloat16", draw)
        case(f"anything bf16 {size}", *anything, size)
        case(f"unverified bf16 {size}", *anything, size, verify=False)
    only: dict[int, Layout] = {0: [whole_tensor(name, shape, "float32") for name, shape in SHAPES.items()]}
    case("rank 0 to rank 1, others idle", only, {1: only[0]}, 500)
    case(
        "rank 0 to itself, others idle",
        only,
        {0: Grid([0], 1, 1, "bfloat16").layouts(SHAPES, random.Random(5))[0]},
        500,
    )
    bf16: dict[int, Layout] = {0: [whole_tensor(name, shape, "bfloat16") for name, shape in SHAPES.items()]}
    case("bf16 to fp32, others idle", bf16, {1: only[0]}, 500)
    if world == 4:  # ranks of the plan are the world's, also in a group of its own
        pair = dist.new_group([1, 3])
        moved = Case(rank, SHAPES, {3: only[0]}, {1: only[0]})
        found["rank 3 to rank 1 in their group, others idle"] = moved.run(500, group=pair)
    return found


def failures(rank: int) -> dict[str, str]:
    """Rank 0 sends to rank 1 (and to itself); something breaks; every rank must return."""
    shapes: Shapes = {"a.weight": (6, 8), "b.weight": (6, 8), "c.bias": (9,)}
    whole = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    halves = [Piece(p.name, p.lo, p.size, f"engine.{p.name}", 0, p.stride, "bfloat16") for p in whole]
    found = {}

    def case(name: str, to: int, harm: Callable[[Tensor], Tensor]) -> None:
        one = Case(rank, shapes, {0: whole}, {to: halves})
        found[name] = one.error(**({"destination": Broken(one, "b.weight", harm)} if rank == to else {}))

    for name, harm in {"stale": stale, "flipped": flipped, "swapped": swapped}.items():
        case(name, 1, harm)
        case(f"local {name}", 0, harm)
    swap = Case(rank, shapes, {0: whole}, {1: halves})
    if rank == 1:  # two tensors of one shape exchanged in the engine
        names = {"engine.a.weight": "engine.b.weight", "engine.b.weight": "engine.a.weight"}

        wrote: set[str] = set()

        class Exchanged(TensorWeights):
            def view(self, piece: Piece) -> Tensor:
                again = piece.storage in wrote
                wrote.add(piece.storage)
                other = names.get(piece.storage, piece.storage) if again else piece.storage
                return strided_view(swap.filled[other], piece)

        found["items exchanged"] = swap.error(destination=Exchanged(swap.filled, swap.wanted))
    else:
        found["items exchanged"] = swap.error()
    unreadable = Case(rank, shapes, {0: whole}, {1: halves})
    if rank == 0:
        del unreadable.held["b.weight"]
    found["source fails"] = unreadable.error()
    everyone = Case(rank, shapes, {0: whole}, dict.fromkeys(range(1, dist.get_world_size()), halves))
    if rank == 0:
        del everyone.held["b.weight"]
    found["source of many fails"] = everyone.error()
    partial = Case(rank, shapes, {0: whole}, {1: halves})
    more = [*halves, Piece("a.weight", (0, 0), (6, 8), "engine.more", 0, (8, 1), "bfloat16")]
    found["not all written"] = partial.error(
        **({"destination": TensorWeights(partial.filled, more)} if rank == 1 else {})
    )
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    rank, world = start_rank(folder)
    found = {"gloo": {"good": good_cases(rank, world), "failures": failures(rank)}}
    BUFFERS.append(Buffers(CPU, connect(dist.group.WORLD)))
    assert BUFFERS[-1].channel, "these ranks are on one host"
    found["shared memory"] = {"good": good_cases(rank, world), "failures": failures(rank)}
    report(folder, found)


if __name__ == "__main__":
    main()
