"""Random layouts for the tests: tensors cut, replicated, staged and stored in any strides over any ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from aligner.reshard.plan.region import Box, Layout, Piece

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Grid:
    """A role in the classic way: data x pipeline x tensor over a list of ranks."""

    ranks: Sequence[int]
    tensor: int
    pipeline: int
    dtype: str = "float32"

    def layouts(self, shapes: Shapes, draw: random.Random) -> dict[int, Layout]:
        """Tensor-parallel along a random dimension (or replicated), staged by tensor, replicated over the rest."""
        cuts = {name: draw.choice([None, *range(len(shape))]) for name, shape in shapes.items()}
        found: dict[int, Layout] = {}
        for place, rank in enumerate(self.ranks):
            shard, stage = place % self.tensor, place // self.tensor % self.pipeline
            boxes = []
            for number, (name, shape) in enumerate(shapes.items()):
                if number * self.pipeline // len(shapes) != stage:
                    continue
                lo, size, dim = [0] * len(shape), list(shape), cuts[name]
                if dim is not None:
                    lo[dim] = shape[dim] * shard // self.tensor
                    size[dim] = shape[dim] * (shard + 1) // self.tensor - lo[dim]
                if all(size):
                    boxes.append((name, Box(tuple(lo), tuple(size))))
            found[rank] = store(boxes, self.dtype, draw)
        return found


def scattered(shapes: Shapes, ranks: Sequence[int], dtype: str, draw: random.Random, copies: int) -> dict[int, Layout]:
    """Every tensor `copies` times, cut at random and dealt to random ranks: boxes of one tensor overlap freely."""
    boxes: dict[int, list[tuple[str, Box]]] = {rank: [] for rank in ranks}
    for name, shape in shapes.items():
        for _ in range(copies):
            for box in shattered(Box((0,) * len(shape), shape), draw):
                boxes[draw.choice(ranks)].append((name, box))
    return {rank: store(held, dtype, draw) for rank, held in boxes.items()}


def parts(shapes: Shapes, ranks: Sequence[int], dtype: str, draw: random.Random) -> dict[int, Layout]:
    """Every rank gets a random disjoint part of every tensor."""
    found: dict[int, Layout] = {}
    for rank in ranks:
        boxes = [
            (name, box)
            for name, shape in shapes.items()
            for box in shattered(Box((0,) * len(shape), shape), draw)
            if draw.random() < 0.6
        ]
        found[rank] = store(boxes, dtype, draw)
    return found


def shattered(box: Box, draw: random.Random) -> list[Box]:
    """Disjoint boxes that make up `box`."""
    dims = [dim for dim, extent in enumerate(box.size) if extent > 1]
    if not dims or draw.random() < 0.4:
        return [box]
    dim = draw.choice(dims)
    cut = draw.randrange(1, box.size[dim])
    low = Box(box.lo, (*box.size[:dim], cut, *box.size[dim + 1 :]))
    high = Box(
        (*box.lo[:dim], box.lo[dim] + cut, *box.lo[dim + 1 :]),
        (*box.size[:dim], box.size[dim] - cut, *box.size[dim + 1 :]),
    )
    return shattered(low, draw) + shattered(high, draw)


def store(boxes: list[tuple[str, Box]], dtype: str, draw: random.Random) -> Layout:
    """Put boxes into a few storages, dimensions in random order in memory, with gaps between them.

    `dtype` may name several, of which each box gets one.
    """
    ends: dict[str, int] = {}
    layout = []
    for name, box in boxes:
        kind = draw.choice(dtype.split())
        storage = f"{kind}.{draw.randrange(3)}"
        order = draw.choice(list(permutations(range(len(box.size)))))
        stride, step = [0] * len(box.size), 1
        for dim in order:
            stride[dim] = step
            step *= box.size[dim]
        offset = ends.get(storage, 0) + draw.randrange(3)
        ends[storage] = offset + step
        layout.append(Piece(name, box.lo, box.size, storage, offset, tuple(stride), kind))
    return layout
