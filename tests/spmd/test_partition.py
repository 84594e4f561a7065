"""Row partitions: whole groups, every row once, balanced by cost within the known bound; transfers plan every row once."""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import Shares, balance, idle, minibatch_groups, partition
from aligner.spmd.transfer import plan_moves

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)
COSTS = st.sampled_from([TOKENS, Cost(100, 1), Cost(7, 3), Cost(1, 0), Cost(0, 1)])


@given(LENGTHS, st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), COSTS)
def test_every_row_once_groups_whole_minibatches_alike(
    lengths: list[int], shards: int, group_size: int, minibatches: int, cost: Cost
) -> None:
    rows = [n for n in lengths for _ in range(group_size)]
    shares = partition(rows, shards, group_size, minibatches, cost)
    assert sorted(row for share in shares for row in share) == list(range(len(rows)))
    for share in shares:
        groups = {row // group_size for row in share}
        assert sorted(share) == [g * group_size + i for g in sorted(groups) for i in range(group_size)]
    for members in minibatch_groups(len(lengths), minibatches):
        costs = [cost.of(length) for length in lengths]
        loads = [sum(costs[g] for g in members if g * group_size in share) for share in shares]
        if members:  # Graham's bound: no shard is above the mean by more than the dearest group
            assert max(loads) <= sum(loads) / shards + max(costs[g] for g in members)


def greedy_by_tokens(lengths: list[int], shards: int, group_size: int) -> Shares:
    """Longest group first to the shard with the fewest tokens, written out."""
    groups = [range(at, at + group_size) for at in range(0, len(lengths), group_size)]
    held: list[list[int]] = [[] for _ in range(shards)]
    for rows in sorted(groups, key=lambda rows: -sum(lengths[row] for row in rows)):
        least = min(range(shards), key=lambda shard: (sum(lengths[row] for row in held[shard]), len(held[shard])))
        held[least] += rows
    return tuple(map(tuple, held))


@given(LENGTHS, st.integers(1, 8), st.integers(1, 4), COSTS)
def test_never_worse_than_greedy_by_tokens(lengths: list[int], shards: int, group_size: int, cost: Cost) -> None:
    rows = lengths[: len(lengths) // group_size * group_size] or lengths[:1] * group_size

    def dearest(shares: Shares) -> int:
        return max(sum(cost.of(rows[row]) for row in share) for share in shares)

    assert dearest(partition(rows, shards, group_size, 1, cost)) <= dearest(greedy_by_tokens(rows, shards, group_size))


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(2, 3))
def test_near_the_best_deal_that_there_is(costs: list[int], shards: int) -> None:
    best = min(
        max(sum(cost for cost, at in zip(costs, places, strict=True) if at == shard) for shard in range(shards))
        for places in product(range(shards), repeat=len(costs))
    )
    found = balance(costs, shards)
    assert sorted(item for share in found for item in share) == list(range(len(costs)))
    # Graham's bound for largest first
    assert max(sum(costs[item] for item in share) for share in found) <= (4 / 3 - 1 / (3 * shards)) * best


def test_better_than_largest_first() -> None:
    # largest first: 8 | 7, 6 and 5 -> 13 | 13, 4 -> 17 | 13. By differences: 8 - 7 = 1, 6 - 5 = 1, 4 - 1 = 3, 3 - 1 = 2
    shares = balance([8, 7, 6, 5, 4], 2)
    assert sorted(sum((8, 7, 6, 5, 4)[item] for item in share) for share in shares) == [14, 16]


def skewed(rows: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [max(1, min(16000, int(500 * draw.lognormvariate(0, 1)))) for _ in range(rows)]


def test_the_same_in_any_process() -> None:
    lengths = skewed(512, 3)
    program = (
        "from aligner.spmd.cost import Cost; from aligner.spmd.partition import partition; import zlib;"
        f"print(zlib.crc32(repr(partition({lengths}, 6, 4, 3, Cost(10**10, 10**6))).encode()))"
    )
    found = set()
    for seed in ("0", "1"):
        env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    expected = zlib.crc32(repr(partition(lengths, 6, 4, 3, Cost(10**10, 10**6))).encode())
    assert found == {f"{expected}\n"}


def test_idle_by_hand() -> None:
    # squares 16, 1, 4, 9; steps of two rows: (16 | 1), (4 | 9), so that 2 x (16 + 9) is waited for and 30 computed
    assert idle([4, 1, 2, 3], ((0, 2), (1, 3)), 1, 2, Cost(0, 1)) == pytest.approx(
        1 - (16 + 1 + 4 + 9) / (2 * (16 + 9))
    )
    assert idle([4, 1, 2, 3], ((0, 3), (1, 2)), 2, 1, TOKENS) == pytest.approx(1 - 10 / (2 * 7))
    assert idle([5, 5], ((0,), (1,)), 1, 1, Cost(3, 2)) == 0


def test_minibatches_are_balanced_by_themselves() -> None:
    # each of the two steps has one row of 9 and three of 3: both shards have 9 in each, and not 18 in one of them
    assert partition([9, 3, 3, 3, 9, 3, 3, 3], 2, 1, 2) == ((0, 4), (1, 2, 3, 5, 6, 7))


def test_worked_by_hand() -> None:
    # longest first: 9 -> shard 0, 7 -> shard 1, 5 -> shard 1 (7 < 9), 4 -> shard 0 (9 < 12)
    assert partition([4, 9, 5, 7], 2) == ((0, 1), (2, 3))
    # groups of two: (4+9)=13 -> 0, (5+7)=12 -> 1
    assert partition([4, 9, 5, 7], 2, group_size=2) == ((0, 1), (2, 3))


def plan_of_all(sources: Any, source_ranks: Any, targets: Any, target_ranks: Any) -> dict[tuple[int, int], list[int]]:
    """(source, reader) -> rows, planned in one place for every rank at once: what the ranks' own plans must add up to."""
    moves: dict[tuple[int, int], list[int]] = {}
    turn = 0
    everywhere = [rank for ranks in source_ranks for rank in ranks]
    for share, readers in zip(targets, target_ranks, strict=True):
        for reader in readers:
            if not share:
                moves[reader if reader in everywhere else everywhere[turn % len(everywhere)], reader] = []
            for row in share:
                ranks = next(ranks for held, ranks in zip(sources, source_ranks, strict=True) if row in held)
                moves.setdefault((reader if reader in ranks else ranks[turn % len(ranks)], reader), []).append(row)
            turn += 1
    return moves


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_moves_bring_each_reader_its_rows_once(
    lengths: list[int], source_shards: int, replicas: int, target_shards: int, readers: int, shift: int
) -> None:
    sources = partition(lengths, source_shards)
    source_ranks = [[s * replicas + i for i in range(replicas)] for s in range(source_shards)]
    targets = partition(lengths, target_shards)
    target_ranks = [[shift + s * readers + i for i in range(readers)] for s in range(target_shards)]
    ranks = range(max(source_shards * replicas, shift + target_shards * readers))
    plans = {rank: plan_moves(rank, sources, source_ranks, targets, target_ranks) for rank in ranks}
    holds = {rank: set(share) for share, ranks in zip(sources, source_ranks, strict=True) for rank in ranks}
    for share, shard_ranks in zip(targets, target_ranks, strict=True):
        for reader in shard_ranks:
            _, incoming = plans[reader]
            assert sorted(row for rows in incoming.values() for row in rows) == list(share)
    together = {}
    for rank, (outgoing, incoming) in plans.items():
        for source, rows in incoming.items():
            assert source == rank or plans[source][0][rank] == rows, "both ends must know of a message"
            assert set(rows) <= holds[source]
            assert source == rank or not (set(rows) & holds.get(rank, set())), "a row that the reader holds"
            together[source, rank] = rows
        for reader in outgoing:
            assert reader != rank and rank in plans[reader][1]
    assert together == plan_of_all(sources, source_ranks, targets, target_ranks)
