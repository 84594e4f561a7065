"""How an engine's parameter is cut out of the checkpoint's tensors, for any number of ranks (pure arithmetic, no torch)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from aligner.reshard.plan.region import contiguous_stride


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one tensor of the checkpoint: all of it, or one projection of a tensor that fuses several."""

    name: str
    """The tensor's name; inside its layer (or expert) for a layer's (or an expert's) parameters."""
    shape: tuple[int, ...]
    """Of these rows."""
    start: int = 0
    """Where they begin in the tensor."""

    @property
    def rows(self) -> int:
        """Number of rows, of the whole block."""
        return self.shape[0]


class Region(NamedTuple):
    """A box of a checkpoint tensor, and where a rank's parameter keeps it."""

    name: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    """Elements from the parameter's first."""
    stride: tuple[int, ...]


class Cut(ABC):
    """How the ranks of an axis share a parameter."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """What the parameter is made of, in the order of the checkpoint's names."""

    @abstractmethod
    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """What rank `index` of `parts` holds; nothing where it lies beyond the end (of a small vocabulary)."""


@dataclass(frozen=True)
class Replicated(Cut):
    """Whole on every rank."""

    block: Block

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The one."""
        return (self.block,)

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """All of it."""
        yield _rows(self.block, 0, self.block.rows, 0)


@dataclass(frozen=True)
class Rows(Cut):
    """An equal share of the rows of each block, one block below the other: a linear layer cut along its output.

    One block is a plain column-parallel layer, two are a fused gate and up projection, three vLLM's query, key and value.
    """

    stacked: tuple[Block, ...]
    heads: tuple[int | None, ...] = ()
    """Of each block: how many heads its rows are. Beyond that many ranks, neighbours hold copies of one head.
    None, or nothing said: it is cut whatever its rows mean."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """From top to bottom."""
        return self.stacked

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """One for each block."""
        row = 0
        for number, block in enumerate(self.stacked):
            heads = self.heads[number] if self.heads else None
            copies = max(1, parts // heads) if heads else 1
            held = block.rows * copies // parts
            yield _rows(block, index // copies * held, held, row)
            row += held


@dataclass(frozen=True)
class Columns(Cut):
    """An equal share of the second dimension: a linear layer cut along its input (row-parallel)."""

    block: Block

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The one."""
        return (self.block,)

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """One box of all rows."""
        rows, columns = self.block.shape
        width = columns // parts
        yield Region(self.block.name, (self.block.start, index * width), (rows, width), 0, (width, 1))


@dataclass(frozen=True)
class Vocabulary(Cut):
    """Rows of an embedding or output layer, cut after rounding their number up; the rows added are no rank's region."""

    block: Block
    multiple: int = 1
    """The number is rounded up to a multiple of this and of the ranks."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The one."""
        return (self.block,)

    def padded(self, parts: int) -> int:
        """Rows over all ranks, with those that no checkpoint fills."""
        multiple = math.lcm(self.multiple, parts)
        return -(-self.block.rows // multiple) * multiple

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """One, or none."""
        held = self.padded(parts) // parts
        start = min(index * held, self.block.rows)
        if start < self.block.rows:
            yield _rows(self.block, start, min(held, self.block.rows - start), 0)


@dataclass(frozen=True)
class GroupedQKV(Cut):
    """Megatron's fused projection: for every key/value head its queries' rows, then its key's, then its value's.

    These rows are cut evenly. Beyond the key/value heads a cut may fall inside a head: the ranks then gather the rows of
    their head at every forward, and none holds a copy.
    """

    query: Block
    key: Block
    value: Block
    kv_heads: int

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Query, key, value."""
        return self.query, self.key, self.value

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """Up to three for each key/value head."""
        of_group = [block.rows // self.kv_heads for block in self.blocks]
        held = self.kv_heads * sum(of_group) // parts
        begin, end, row = index * held, (index + 1) * held, 0
        for group in range(self.kv_heads):
            for block, rows in zip(self.blocks, of_group, strict=True):
                low, high = max(begin, row), min(end, row + rows)
                if low < high:
                    yield _rows(block, group * rows + low - row, high - low, low - begin)
                row += rows


def _rows(block: Block, start: int, rows: int, local_row: int) -> Region:
    """Rows [start, start + rows) of a block, from row `local_row` of the parameter on."""
    rest = block.shape[1:]
    stride = contiguous_stride((rows, *rest))
    return Region(block.name, (block.start + start, *(0 for _ in rest)), (rows, *rest), local_row * stride[0], stride)


@dataclass(frozen=True)
class Parameter:
    """A parameter of an engine by its name there (inside a layer or an expert for theirs), and how it is cut."""

    storage: str
    cut: Cut


class ParameterRegion(NamedTuple):
    """A region of one of several parameters."""

    storage: str
    region: Region
    elements: int
    """Of the whole parameter on this rank: what the next expert's begins after, where experts lie in one storage."""


class CutParameters:
    """Some parameters cut over the ranks of an axis: each distinct region once, with the ranks that hold it."""

    def __init__(self, parameters: Iterable[Parameter], parts: int) -> None:
        self.of_part: list[list[ParameterRegion]] = [[] for _ in range(parts)]
        """Of each rank of the axis, in the order of the parameters."""
        holders: dict[ParameterRegion, list[int]] = {}
        for parameter in parameters:
            for part in range(parts):
                regions = list(parameter.cut.regions(parts, part))
                elements = sum(math.prod(region.size) for region in regions)
                for held in (ParameterRegion(parameter.storage, region, elements) for region in regions):
                    self.of_part[part].append(held)
                    holders.setdefault(held, []).append(part)
        self.by_name: dict[str, list[tuple[ParameterRegion, tuple[int, ...]]]] = {}
        """Of each tensor: its regions, and the ranks of the axis that hold them."""
        for held, members in holders.items():
            self.by_name.setdefault(held.region.name, []).append((held, tuple(members)))


def tensor_shapes(parameters: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint's tensors that these parameters are made of, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (block for parameter in parameters for block in parameter.cut.blocks):
        rows = max(block.start + block.rows, shapes.get(block.name, (0,))[0])
        shapes[block.name] = (rows, *block.shape[1:])
    return shapes
