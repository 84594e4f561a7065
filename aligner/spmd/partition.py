"""Which rows each data-parallel shard gets: a pure function, so that every rank computes the same answer."""

from __future__ import annotations

from collections.abc import Sequence

Shares = tuple[tuple[int, ...], ...]
"""For each shard, the ascending global row numbers that it holds."""


def minibatch_groups(groups: int, minibatches: int) -> list[range]:
    """Consecutive groups of each minibatch, sizes differing by at most one."""
    bounds = [groups * i // minibatches for i in range(minibatches + 1)]
    return [range(bounds[i], bounds[i + 1]) for i in range(minibatches)]


def partition(lengths: Sequence[int], shards: int, group_size: int = 1, minibatches: int = 1) -> Shares:
    """Rows -> shards, balanced by tokens, whole groups together, every minibatch balanced by itself.

    Args:
        lengths: tokens of each row, in global order; rows of one group are consecutive.
        shards: data-parallel shards of the reading role.
        group_size: rows of one prompt, kept on one shard.
        minibatches: optimizer steps that the batch is cut into; minibatch j holds the same rows under any layout.

    Longest group first to the least loaded shard (Graham 1969: at most 4/3 of the best balance); ties go to the
    lower index, so the answer is the same on every rank.
    """
    assert len(lengths) % group_size == 0, f"{len(lengths)} rows are not whole groups of {group_size}"
    tokens = [sum(lengths[g * group_size : (g + 1) * group_size]) for g in range(len(lengths) // group_size)]
    held: list[list[int]] = [[] for _ in range(shards)]
    for members in minibatch_groups(len(tokens), minibatches):
        load = [0] * shards
        count = [0] * shards
        for group in sorted(members, key=lambda g: (-tokens[g], g)):
            shard = min(range(shards), key=lambda s: (load[s], count[s], s))
            load[shard] += tokens[group]
            count[shard] += 1
            held[shard].extend(range(group * group_size, (group + 1) * group_size))
    return tuple(tuple(sorted(rows)) for rows in held)
