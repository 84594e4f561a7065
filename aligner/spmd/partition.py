"""Sequence-length balancing: which rows each data-parallel rank gets, by cost. A pure function, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

from aligner.spmd.cost import TOKENS, Cost

Shares = tuple[tuple[int, ...], ...]
"""For each data-parallel shard, its global row numbers in ascending order."""
CLOSE = 1000
"""Balancing stops when the largest load is within 1 / CLOSE of the mean."""
PARTNERS = 4
"""Number of least loaded shards that the most loaded one tries to rebalance with."""


def minibatch_groups(groups: int, minibatches: int) -> list[range]:
    """Consecutive groups of each minibatch, sizes differing by at most one."""
    bounds = [groups * i // minibatches for i in range(minibatches + 1)]
    return [range(bounds[i], bounds[i + 1]) for i in range(minibatches)]


def partition(
    lengths: Sequence[int], shards: int, group_size: int = 1, minibatches: int = 1, cost: Cost = TOKENS
) -> Shares:
    """Assign rows to shards, balanced by cost; groups stay together, each minibatch is balanced by itself.

    Args:
        lengths: tokens of each row, in global order; rows of one group are consecutive.
        shards: data-parallel shards of the reading role.
        group_size: rows of one prompt, kept on one shard.
        minibatches: optimizer steps that the batch is cut into; minibatch j holds the same rows under any layout.
        cost: what a row costs the reading role.
    """
    assert len(lengths) % group_size == 0, f"{len(lengths)} rows are not whole groups of {group_size}"
    groups = len(lengths) // group_size
    tokens, costs = of_groups(lengths, group_size, TOKENS), of_groups(lengths, group_size, cost)
    groups_of_shard: list[list[int]] = [[] for _ in range(shards)]
    for members in minibatch_groups(groups, minibatches):
        part = slice(members.start, members.stop)
        for share, members_of_shard in zip(groups_of_shard, balance(costs[part], shards, tokens[part]), strict=True):
            share += [members.start + group for group in members_of_shard]
    return tuple(
        tuple(row for group in sorted(share) for row in range(group * group_size, (group + 1) * group_size))
        for share in groups_of_shard
    )


def of_groups(lengths: Sequence[int], group_size: int, cost: Cost) -> list[int]:
    """Cost of each group of consecutive rows."""
    ends = [0, *accumulate(cost.of(length) for length in lengths)]
    return [ends[at + group_size] - ends[at] for at in range(0, len(lengths), group_size)]


def balance(costs: Sequence[int], shards: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Assign items to shards so that the largest load is close to the mean.

    Greedy: the most expensive item first, to the least loaded shard (Graham 1969: at most 4/3 of the optimum), by `costs`
    and by `order` (such as tokens), whichever is better. Then, while it helps, the most loaded shard and one of the least
    loaded repartition their items by largest differencing (Karmarkar and Karp 1982). Ties go to lower numbers.
    """
    shares = min((_greedy(key, shards) for key in (costs, order or costs)), key=lambda dealt: _most(dealt, costs))
    loads = [sum(costs[item] for item in share) for share in shares]
    total = sum(loads)
    for _ in range(2 * shards):
        fullest = max(range(shards), key=lambda shard: (loads[shard], -shard))
        if CLOSE * shards * loads[fullest] <= (CLOSE + 1) * total:
            break
        emptiest = heapq.nsmallest(PARTNERS, (shard for shard in range(shards) if shard != fullest), loads.__getitem__)
        for other in emptiest:
            pair = _halves(sorted([*shares[fullest], *shares[other]]), costs)
            sums = [sum(costs[item] for item in half) for half in pair]
            if max(sums) < loads[fullest]:
                for shard, half, load in zip((fullest, other), pair, sums, strict=True):
                    shares[shard], loads[shard] = half, load
                break
        else:
            break
    return shares


def idle(lengths: Sequence[int], shares: Shares, group_size: int, minibatches: int, cost: Cost) -> float:
    """Fraction of the shards' time (0 to 1) spent waiting for the most loaded one, summed over minibatches."""
    groups = minibatch_groups(len(lengths) // group_size, minibatches)
    step = {group: number for number, members in enumerate(groups) for group in members}
    loads = [[0] * len(shares) for _ in groups]
    for shard, rows in enumerate(shares):
        for row in rows:
            loads[step[row // group_size]][shard] += cost.of(lengths[row])
    longest = sum(max(load) for load in loads) * len(shares)
    return 1 - sum(map(sum, loads)) / longest if longest else 0.0


def _greedy(costs: Sequence[int], shards: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(shards)]
    heap = [(0, 0, shard) for shard in range(shards)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, count, shard = heap[0]
        shares[shard].append(item)
        heapq.heapreplace(heap, (load + costs[item], count + 1, shard))
    return shares


def _most(dealt: Sequence[Sequence[int]], costs: Sequence[int]) -> int:
    return max(sum(costs[item] for item in share) for share in dealt)


def _halves(items: Sequence[int], costs: Sequence[int]) -> list[list[int]]:
    """Largest differencing: two shares of nearly equal cost; the two largest items are separated, their difference remains."""
    heap: list[tuple[int, int, list[int], list[int]]]
    heap = [(-costs[item], number, [item], []) for number, item in enumerate(items)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (large, number, more, less), (small, _, more_2, less_2) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (large - small, number, more + less_2, less + more_2))
    return [heap[0][2], heap[0][3]]
