"""Row partitions: whole groups, every row once, balanced within the known bound; transfers plan every row once."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aligner.spmd.partition import minibatch_groups, partition
from aligner.spmd.transfer import plan_moves

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 8), st.integers(1, 4), st.integers(1, 5))
def test_every_row_once_groups_whole_minibatches_alike(
    lengths: list[int], shards: int, group_size: int, minibatches: int
) -> None:
    rows = [n for n in lengths for _ in range(group_size)]
    shares = partition(rows, shards, group_size, minibatches)
    assert sorted(row for share in shares for row in share) == list(range(len(rows)))
    for share in shares:
        groups = {row // group_size for row in share}
        assert sorted(share) == [g * group_size + i for g in sorted(groups) for i in range(group_size)]
    for members in minibatch_groups(len(lengths), minibatches):
        loads = [sum(lengths[g] for g in members if g * group_size in share) for share in shares]
        if members:  # Graham's bound: no shard is above the mean by more than the longest group
            assert max(loads) <= sum(loads) / shards + max(lengths[g] for g in members)


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
