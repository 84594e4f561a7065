"""How an engine's parameter is sharded from the checkpoint's tensors, for any number of ranks (pure arithmetic, no torch)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from aligner.reshard.plan.region import contiguous_stride


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a checkpoint tensor: all of it, or one projection of a fused tensor."""

    name: str
    """The tensor's name; relative to its layer or expert for parameters of those."""
    shape: tuple[int, ...]
    """Shape of these rows."""
    start: int = 0
    """First row, in the tensor."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.shape[0]


class Region(NamedTuple):
    """A box of a checkpoint tensor, as a strided view of a rank's parameter."""

    name: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    """In elements, from the parameter's first."""
    stride: tuple[int, ...]


class Cut(ABC):
    """How a parameter is sharded over the ranks of an axis."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that the parameter consists of, in the order of the checkpoint's names."""

    @abstractmethod
    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """The regions that rank `index` of `parts` holds; none if it is beyond the end (of a small vocabulary)."""


@dataclass(frozen=True)
class Replicated(Cut):
    """Complete on every rank."""

    block: Block

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The one block."""
        return (self.block,)

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """The complete block."""
        yield _rows(self.block, 0, self.block.rows, 0)


@dataclass(frozen=True)
class Rows(Cut):
    """An equal share of the rows of each of several stacked blocks: a linear layer sharded along its output (column-parallel).

    One block is a plain column-parallel layer, two a fused gate and up projection, three vLLM's query, key and value.
    """

    stacked: tuple[Block, ...]
    heads: tuple[int | None, ...] = ()
    """Number of heads of each block; with more ranks, neighbouring ranks hold copies of one head. None or empty: the rows are
    split regardless of heads."""

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
            local_rows = block.rows * copies // parts
            yield _rows(block, index // copies * local_rows, local_rows, row)
            row += local_rows


@dataclass(frozen=True)
class Columns(Cut):
    """An equal share of the second dimension: a linear layer sharded along its input (row-parallel)."""

    block: Block

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The one block."""
        return (self.block,)

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """One region with all rows."""
        rows, columns = self.block.shape
        width = columns // parts
        yield Region(self.block.name, (self.block.start, index * width), (rows, width), 0, (width, 1))


@dataclass(frozen=True)
class Vocabulary(Cut):
    """Rows of an embedding or output layer, split after padding their number; padding rows belong to no region."""

    block: Block
    multiple: int = 1
    """The number of rows is padded to a multiple of this and of the number of ranks."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The one block."""
        return (self.block,)

    def padded(self, parts: int) -> int:
        """Number of rows over all ranks, padding included."""
        multiple = math.lcm(self.multiple, parts)
        return -(-self.block.rows // multiple) * multiple

    def regions(self, parts: int, index: int) -> Iterator[Region]:
        """One, or none."""
        local_rows = self.padded(parts) // parts
        start = min(index * local_rows, self.block.rows)
        if start < self.block.rows:
            yield _rows(self.block, start, min(local_rows, self.block.rows - start), 0)


@dataclass(frozen=True)
class GroupedQKV(Cut):
    """Megatron's fused projection: for every key/value head the rows of its queries, its key and its value.

    The rows are split evenly. With more ranks than key/value heads a split may fall inside a head: the ranks then all-gather
    the head's outputs at every forward, and none holds a copy.
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
        rows_per_group = [block.rows // self.kv_heads for block in self.blocks]
        local_rows = self.kv_heads * sum(rows_per_group) // parts
        begin, end, row = index * local_rows, (index + 1) * local_rows, 0
        for group in range(self.kv_heads):
            for block, rows in zip(self.blocks, rows_per_group, strict=True):
                low, high = max(begin, row), min(end, row + rows)
                if low < high:
                    yield _rows(block, group * rows + low - row, high - low, low - begin)
                row += rows


def _rows(block: Block, start: int, rows: int, local_row: int) -> Region:
    """Rows [start, start + rows) of a block, from row `local_row` of the parameter on."""
    row_shape = block.shape[1:]
    stride = contiguous_stride((rows, *row_shape))
    return Region(
        block.name, (block.start + start, *(0 for _ in row_shape)), (rows, *row_shape), local_row * stride[0], stride
    )


@dataclass(frozen=True)
class Parameter:
    """An engine's parameter: its name there (relative to its layer or expert for parameters of those) and its sharding."""

    storage: str
    cut: Cut


class ParameterRegion(NamedTuple):
    """A region held by a rank, with its parameter."""

    storage: str
    region: Region
    elements: int
    """Of the complete parameter on this rank: the offset of the next expert, where experts share a storage."""


class CutParameters:
    """Parameters sharded over the ranks of an axis: each distinct region once, with the ranks that hold it."""

    def __init__(self, parameters: Iterable[Parameter], parts: int) -> None:
        self.of_part: list[list[ParameterRegion]] = [[] for _ in range(parts)]
        """Regions of each rank of the axis, in the order of the parameters."""
        holders: dict[ParameterRegion, list[int]] = {}
        for parameter in parameters:
            for part in range(parts):
                regions = list(parameter.cut.regions(parts, part))
                elements = sum(math.prod(region.size) for region in regions)
                for held in (ParameterRegion(parameter.storage, region, elements) for region in regions):
                    self.of_part[part].append(held)
                    holders.setdefault(held, []).append(part)
        self.by_name: dict[str, list[tuple[ParameterRegion, tuple[int, ...]]]] = {}
        """By tensor name: its regions, each with the ranks of the axis that hold it."""
        for held, members in holders.items():
            self.by_name.setdefault(held.region.name, []).append((held, tuple(members)))


def tensor_shapes(parameters: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint tensors that these parameters consist of, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (block for parameter in parameters for block in parameter.cut.blocks):
        rows = max(block.start + block.rows, shapes.get(block.name, (0,))[0])
        shapes[block.name] = (rows, *block.shape[1:])
    return shapes
