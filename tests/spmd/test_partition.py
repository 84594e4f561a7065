"""Row partitions: whole groups, every row once, balanced within the known bound; transfers plan every row once."""

from __future__ import annotations

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


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_moves_bring_each_reader_its_rows_once(
    lengths: list[int], source_shards: int, replicas: int, readers: int, shift: int
) -> None:
    sources = partition(lengths, source_shards)
    source_ranks = [[s * replicas + i for i in range(replicas)] for s in range(source_shards)]
    targets = partition(lengths, readers)
    target_ranks = [[shift + i] for i in range(readers)]
    moves = plan_moves(sources, source_ranks, targets, target_ranks)
    holds = {rank: set(share) for share, ranks in zip(sources, source_ranks, strict=True) for rank in ranks}
    for share, (reader,) in zip(targets, target_ranks, strict=True):
        got = sorted(row for (_, to), rows in moves.items() if to == reader for row in rows)
        assert got == sorted(share)
    for (source, to), rows in moves.items():
        assert set(rows) <= holds[source]
        assert source == to or not (set(rows) & holds.get(to, set())), "a row that the reader holds must not travel"
