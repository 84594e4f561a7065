"""Prefix sharing: which beginnings the rows of a batch have in common, and the segments that compute each of them once.

Found by comparing token ids, whatever the rows are: samples of one prompt, pairs, rows with one system prompt. Of the tokens
that rows have in common the last one stays with each row: what follows it differs, so that every shared token predicts one
next token, and every row's last token is its own.
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
    """Consecutive tokens, computed once for all rows that begin with those of its ancestors and its own."""

    parent: int
    """Number of the segment before it; -1: it begins these rows."""
    start: int
    """Position of its first token."""
    stop: int
    """One past the position of its last token."""
    rows: tuple[int, ...]
    """The rows that have it; one at the end of a row."""


@dataclass(frozen=True)
class PrefixTree:
    """Beginnings that rows of a batch share, as nodes of a tree: a node's tokens come after those of its parent."""

    parents: tuple[int, ...]
    """Of each node; -1: it begins at a row's first token. Parents have lower numbers."""
    starts: tuple[int, ...]
    """Position of each node's first token."""
    stops: tuple[int, ...]
    """One past the position of its last token."""
    last_node_B: tuple[int, ...]
    """Of each row: the last node that it passes through; -1: it shares nothing."""
    length_B: tuple[int, ...]
    """Tokens of each row."""
    order_B: tuple[int, ...]
    """Of each row: its place among the rows in lexicographic order, in which the rows of a node are neighbours."""

    def path(self, row: int) -> list[int]:
        """The nodes that a row passes through, from its first token on."""
        nodes = []
        node = self.last_node_B[row]
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def own_start(self, row: int) -> int:
        """Position from which a row shares nothing."""
        node = self.last_node_B[row]
        return self.stops[node] if node >= 0 else 0

    def node_tokens(self, nodes: Iterable[int]) -> int:
        """Tokens of some nodes."""
        return sum(self.stops[node] - self.starts[node] for node in nodes)

    def tokens(self, rows: Iterable[int]) -> int:
        """Tokens that a microbatch of these rows computes."""
        return self.cost(rows, Cost())

    def cost(self, rows: Iterable[int], cost: Cost) -> int:
        """What a microbatch of these rows costs: a segment costs what it adds to a row that ends before it."""
        rows = list(rows)
        nodes = {node for row in rows for node in self.path(row)}
        own = sum(cost.of(self.length_B[row]) - cost.of(self.own_start(row)) for row in rows)
        return own + sum(cost.of(self.stops[node]) - cost.of(self.starts[node]) for node in nodes)

    def segments(self, rows: Sequence[int]) -> list[Segment]:
        """A microbatch of these rows, which are numbered in this order from 0: what several of them share is one segment.

        Parents come before their children; those without a parent come first, in the order of the rows.
        """
        paths = [self.path(row) for row in rows]
        sharers = Counter(node for path in paths for node in path)
        chains: list[list[tuple[tuple[int, int], int]]] = []  # of each row: (key, stop) of its segments
        for place, (row, path) in enumerate(zip(rows, paths, strict=True)):
            # of nodes that the same rows pass through the last one stands for all
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


def whole_rows(lengths: Sequence[int]) -> PrefixTree:
    """No row shares anything."""
    rows = len(lengths)
    return PrefixTree((), (), (), (-1,) * rows, tuple(lengths), tuple(range(rows)))


def find_prefixes(tokens_BT: Tensor, length_B: Tensor, least: int = 1) -> PrefixTree:
    """The beginnings that at least two rows share.

    Args:
        tokens_BT: int64 on the host.
        length_B: tokens of each row.
        least: tokens of a node, at least: what is shorter is computed by each row.
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
    todo = [(0, len(order), -1, 0)]  # rows order[low:high] share the tokens before `start`, which `node` ends with
    while todo:
        low, high, node, start = todo.pop()
        if high - low < 2:
            for row in order[low:high]:
                last_node[row] = node
            continue
        stop = min(common[low + 1 : high])
        if stop - start >= least:
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
    """How many tokens two rows begin with alike, without the last of them."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return max(0, (int(differs.argmax()) if differs.any() else length) - 1)
