"""Prefix sharing: common prefixes of the rows of a batch, as a tree, and the segments of a microbatch that compute each once.

A row here is one context (see `row_contexts`): a whole row of the batch, or one of an episode's.
Prefixes are found by comparing token ids, so it does not matter what the rows are: samples of one prompt, preference pairs,
contexts of one episode, rows with one system prompt. The last of the tokens that rows have in common is computed by each row, since the next token
differs: every shared token then has one target, and every row's last token belongs to it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from aligner.spmd.cost import Cost


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that are computed once, for all rows that start with its ancestors' tokens and its own."""

    parent: int
    """Index of the segment before it; -1: it starts its rows."""
    start: int
    """Position of its first token."""
    stop: int
    """One past the position of its last token."""
    rows: tuple[int, ...]
    """The rows that have it: one if it is the rest of a row."""


@dataclass(frozen=True)
class PrefixTree:
    """Common prefixes of the rows of a batch: a node's tokens follow those of its parent."""

    parents: tuple[int, ...]
    """Index of each node's parent, which comes before it; -1: it starts its rows."""
    starts: tuple[int, ...]
    """Position of each node's first token."""
    stops: tuple[int, ...]
    """One past the position of its last token."""
    last_node_B: tuple[int, ...]
    """The last node of each row; -1: it shares no prefix."""
    length_B: tuple[int, ...]
    """Number of tokens of each row."""
    order_B: tuple[int, ...]
    """Rank of each row in lexicographic order, in which the rows of a node are consecutive."""

    def path(self, row: int) -> list[int]:
        """The nodes of a row, from its first token on."""
        nodes = []
        node = self.last_node_B[row]
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def own_start(self, row: int) -> int:
        """Position of a row's first token after its last node."""
        node = self.last_node_B[row]
        return self.stops[node] if node >= 0 else 0

    def node_tokens(self, nodes: Iterable[int]) -> int:
        """Number of tokens of these nodes."""
        return sum(self.stops[node] - self.starts[node] for node in nodes)

    def tokens(self, rows: Iterable[int]) -> int:
        """Number of tokens to compute for a microbatch of these rows."""
        return self.cost(rows, Cost())

    def cost(self, rows: Iterable[int], cost: Cost) -> int:
        """Cost of a microbatch of these rows: that of a segment is the difference between rows that end with it and before it."""
        rows = list(rows)
        nodes = {node for row in rows for node in self.path(row)}
        own = sum(cost.of(self.length_B[row]) - cost.of(self.own_start(row)) for row in rows)
        return own + sum(cost.of(self.stops[node]) - cost.of(self.starts[node]) for node in nodes)

    def segments(self, rows: Sequence[int]) -> list[Segment]:
        """The segments of a microbatch of these rows, whose indices in it follow this order.

        Parents come before their children; segments without a parent come first, in the order of the rows.
        """
        paths = [self.path(row) for row in rows]
        sharers = Counter(node for path in paths for node in path)
        chains: list[list[tuple[tuple[int, int], int]]] = []  # of each row: (key, stop) of its segments
        for place, (row, path) in enumerate(zip(rows, paths, strict=True)):
            # consecutive nodes of the same rows are one segment, nodes of one row belong to its own
            counts = [*(sharers[node] for node in path), 1]
            nodes = [node for node, (count, after) in zip(path, pairwise(counts), strict=True) if count > after]
            chain = [((0, node), self.stops[node]) for node in nodes]
            chains.append([*chain, ((1, place), self.length_B[row])])
        members: dict[tuple[int, int], list[int]] = {}
        for depth in range(max(map(len, chains), default=0)):
            for place, chain in enumerate(chains):
                if depth < len(chain):
                    members.setdefault(chain[depth][0], []).append(place)
        number = {key: at for at, key in enumerate(members)}
        made = []
        for key, places in members.items():
            chain = chains[places[0]]
            depth = next(at for at, (other, _) in enumerate(chain) if other == key)
            parent, start = (number[chain[depth - 1][0]], chain[depth - 1][1]) if depth else (-1, 0)
            made.append(Segment(parent, start, chain[depth][1], tuple(places)))
        return made


def separate_rows(lengths: Sequence[int]) -> PrefixTree:
    """Rows without common prefixes."""
    rows = len(lengths)
    return PrefixTree((), (), (), (-1,) * rows, tuple(lengths), tuple(range(rows)))


def segment_starts(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Position of each segment's first token in its rows."""
    starts: list[int] = []
    for parent in parents:
        starts.append(starts[parent] + lengths[parent] if parent >= 0 else 0)
    return starts


def find_prefixes(tokens_BT: Tensor, length_B: Tensor, min_tokens: int = 1) -> PrefixTree:
    """The common prefixes of at least two rows.

    Args:
        tokens_BT: int64, on the host.
        length_B: number of tokens of each row.
        min_tokens: minimum number of tokens of a node.
    """
    lengths: list[int] = length_B.tolist()
    tokens = tokens_BT.numpy().astype(">u4")  # big-endian, so that bytes sort as numbers do
    texts = [tokens[row, :length].tobytes() for row, length in enumerate(lengths)]
    order = sorted(range(len(lengths)), key=lambda row: (texts[row], row))
    common = [0, *(_shared(tokens[a, : lengths[a]], tokens[b, : lengths[b]]) for a, b in pairwise(order))]
    parents: list[int] = []
    starts: list[int] = []
    stops: list[int] = []
    last_node = [-1] * len(lengths)
    todo = [
        (0, len(order), -1, 0)
    ]  # rows order[low:high] have the tokens before `start` in common, those of `node`'s path
    while todo:
        low, high, node, start = todo.pop()
        if high - low < 2:
            for row in order[low:high]:
                last_node[row] = node
            continue
        stop = min(common[low + 1 : high])
        if stop - start >= min_tokens:
            parents.append(node)
            starts.append(start)
            stops.append(stop)
            node, start = len(parents) - 1, stop
        cuts = [low, *(at for at in range(low + 1, high) if common[at] == stop), high]
        todo += [(a, b, node, start) for a, b in pairwise(cuts)]
    place = {row: at for at, row in enumerate(order)}
    return PrefixTree(
        tuple(parents), tuple(starts), tuple(stops), tuple(last_node), tuple(lengths),
        tuple(place[row] for row in range(len(order))),
    )  # fmt: skip


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens that two rows start with in common, less the last one."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return max(0, (int(differs.argmax()) if differs.any() else length) - 1)
