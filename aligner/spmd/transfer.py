"""Row transfers between roles: sent peer to peer from the ranks that hold rows to those that read them, without a controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from aligner.health.timeline import STEP_END, TRANSFER
from aligner.spmd import batch_ops
from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import Channel, all_gather, broadcast, exchange, reduce_to_rank0
from aligner.spmd.partition import Shares
from aligner.spmd.rows import BatchRows
from aligner.spmd.serialization import deserialize, serialize

T = TypeVar("T")
Moves = dict[int, list[int]]
"""Peer -> global rows, ascending. The rank itself: rows that it has already."""


class Home(Protocol):
    """What a transfer asks of the role that holds, or reads, a value."""

    @property
    def name(self) -> str:
        """Of the role, for reports."""
        ...

    @property
    def world(self) -> Channel:
        """Every rank of the job."""
        ...

    @property
    def mesh(self) -> Mesh:
        """The role's ranks."""
        ...

    @property
    def cost(self) -> Cost:
        """What a row costs the role: its rows are shared out by it."""
        ...

    @property
    def member(self) -> bool:
        """Whether this rank is one of the role's."""
        ...

    @property
    def shard(self) -> int | None:
        """This rank's data-parallel shard; None on ranks outside the role."""
        ...


class RefLike(Protocol):
    """A value with a home (`Ref`), as a transfer sees it."""

    @property
    def home(self) -> Home:
        """Who holds it."""
        ...

    @property
    def value(self) -> Any:
        """This rank's shard on home ranks, None elsewhere."""
        ...

    @property
    def rows(self) -> BatchRows | None:
        """Its rows; None: it is not row-wise, and every home rank holds all of it."""
        ...

    @property
    def shares(self) -> Shares:
        """Global row numbers of each home shard."""
        ...

    @property
    def read_cache(self) -> dict[Any, tuple[Any, tuple[int, ...]]]:
        """What roles have read of it; see `Ref`."""
        ...


@lru_cache(maxsize=64)
def shard_of_rows(shares: Shares) -> dict[int, int]:
    """Global row -> the shard that holds it."""
    return {row: shard for shard, share in enumerate(shares) for row in share}


def plan_moves(
    rank: int,
    sources: Shares,
    source_ranks: Sequence[Sequence[int]],
    targets: Shares,
    target_ranks: Sequence[Sequence[int]],
) -> tuple[Moves, Moves]:
    """What one rank sends and receives: pure, and each rank plans its own messages only.

    A rank that holds a row already reads its own copy. Replicas of a row take turns by the reader's number among all
    readers, so that no single tensor-parallel rank sends everything.

    Args:
        sources, targets: rows of each shard on the two sides.
        source_ranks, target_ranks: world ranks that hold (need) each shard.

    Returns:
        (reader -> rows to send, holder -> rows to receive). An empty share still learns the value's type: one message
        of no rows.
    """
    outgoing: Moves = {}
    incoming: Moves = {}
    everywhere = [holder for ranks in source_ranks for holder in ranks]
    turns = _turns(target_ranks)
    of_source, of_target = shard_of_rows(sources), shard_of_rows(targets)
    reads = next((shard for shard, ranks in enumerate(target_ranks) if rank in ranks), None)
    for row in targets[reads] if reads is not None else ():
        ranks = source_ranks[of_source[row]]
        incoming.setdefault(rank if rank in ranks else ranks[turns[rank] % len(ranks)], []).append(row)
    holds = next((shard for shard, ranks in enumerate(source_ranks) if rank in ranks), None)
    for row in sources[holds] if holds is not None else ():
        ranks = source_ranks[holds or 0]
        for reader in target_ranks[of_target[row]]:
            if reader not in ranks and ranks[turns[reader] % len(ranks)] == rank:
                outgoing.setdefault(reader, []).append(row)
    for share, readers in zip(targets, target_ranks, strict=True):
        for reader in readers if not share else ():
            source = reader if reader in everywhere else everywhere[turns[reader] % len(everywhere)]
            if rank == reader:
                incoming[source] = []
            elif rank == source:
                outgoing[reader] = []
    return outgoing, incoming


def _turns(target_ranks: Sequence[Sequence[int]]) -> dict[int, int]:
    """Each reader's number, shard by shard."""
    readers = [reader for ranks in target_ranks for reader in ranks]
    return {reader: turn for turn, reader in enumerate(readers)}


def learn_lengths(world: Channel, rows: BatchRows, readers: Sequence[int]) -> None:
    """Bring `rows.lengths` to every reader that does not have it. Collective over the world."""
    missing = [rank for rank in readers if rank not in rows.known]
    if missing:
        lengths = broadcast(world, rows.lengths, sorted(rows.known), missing)
        rows.known.update(missing)
        rows.lengths = lengths if rows.lengths is None else rows.lengths


def read_rows(
    ref: RefLike, readers: Sequence[Sequence[int]], minibatches: int = 1, cost: Cost = TOKENS
) -> tuple[Any, tuple[int, ...]]:
    """This rank's rows of `ref` under the partition over `readers` (ranks of each reading shard).

    Returns:
        (value, global rows), both None/() on a rank that does not read. [B, T] fields come as wide as the longest
        row of the share, whatever padding they had at home.
    """
    home, world, rows = ref.home, ref.home.world, ref.rows
    assert rows is not None
    learn_lengths(world, rows, [rank for ranks in readers for rank in ranks])
    reads = any(world.rank in ranks for ranks in readers)
    if not reads and not home.member:
        return None, ()
    assert rows.lengths is not None
    targets = rows.shares(len(readers), minibatches, cost)
    sources = ref.shares
    outgoing, incoming = plan_moves(world.rank, sources, home.mesh.shards, targets, readers)
    position_of = {row: place for place, row in enumerate(sources[home.shard or 0])} if home.member else {}

    def rows_here(row_numbers: Sequence[int]) -> Any:
        """These rows of what is here; all of them in order without a copy."""
        return (
            ref.value
            if len(row_numbers) == len(position_of)
            else batch_ops.take(ref.value, [position_of[row] for row in row_numbers])
        )

    # replicas of a reading shard get the same message, packed once
    packed = {
        row_numbers: serialize(rows_here(row_numbers))
        for row_numbers in {tuple(row_numbers) for row_numbers in outgoing.values()}
    }
    messages = {to: packed[tuple(row_numbers)] for to, row_numbers in outgoing.items()}
    received = exchange(world, messages, [source for source in incoming if source != world.rank])
    if not reads:
        return None, ()
    parts = [
        rows_here(row_numbers) if source == world.rank else deserialize(received[source])
        for source, row_numbers in incoming.items()
    ]
    order = [row for row_numbers in incoming.values() for row in row_numbers]
    value = _in_order(parts, order)
    return batch_ops.fit_width(value, max((rows.lengths[row] for row in order), default=0)), tuple(sorted(order))


def _in_order(parts: Sequence[Any], order: Sequence[int]) -> Any:
    """Parts whose rows have the global numbers `order`, joined and sorted by these."""
    value = parts[0] if len(parts) == 1 else batch_ops.join(parts)
    back = sorted(range(len(order)), key=order.__getitem__)
    return value if back == list(range(len(order))) else batch_ops.take(value, back)


def read(ref: RefLike, reader: Home, minibatches: int = 1) -> tuple[Any, tuple[int, ...]]:
    """`ref` as `reader` needs it on this rank: (value, global rows). What was read once is cached in the Ref."""
    key, world = (reader.mesh.shards, minibatches, reader.cost), ref.home.world
    if key not in ref.read_cache:
        with world.timeline.span("call", TRANSFER):
            if ref.rows is None:
                ref.read_cache[key] = (broadcast(world, ref.value, ref.home.mesh.ranks, reader.mesh.ranks), ())
            else:
                ref.read_cache[key] = read_rows(ref, reader.mesh.shards, minibatches, reader.cost)
    return ref.read_cache[key]


def read_everywhere(ref: RefLike) -> Any:
    """The whole value on every rank of the world."""
    home, world = ref.home, ref.home.world
    world.journal.enter(f"get() of a value from {home.name}")
    with world.timeline.span("call", TRANSFER):
        if ref.rows is None:
            return broadcast(world, ref.value, home.mesh.ranks, range(world.size))
        return _whole([part for part in all_gather(world, _own_part(ref), range(world.size)) if part is not None])


Part = tuple[tuple[int, ...], int, Any]
"""A shard's global rows, the length of the longest, and its value."""


def _own_part(ref: RefLike, limit: int | None = None) -> Part | None:
    """This rank's contribution of a row-wise value: its shard's rows (below `limit`), if it is the shard's first rank."""
    home = ref.home
    shard = home.shard
    if shard is None or home.mesh.shards[shard][0] != home.world.rank:
        return None
    assert ref.rows is not None and ref.rows.lengths is not None
    share = ref.shares[shard]
    value = ref.value
    if limit is not None:
        kept = [place for place, row in enumerate(share) if row < limit]
        share, value = tuple(share[place] for place in kept), batch_ops.take(value, kept)
    return share, max((ref.rows.lengths[row] for row in share), default=0), value


def _whole(parts: Sequence[Part]) -> Any:
    value = _in_order([value for *_, value in parts], [row for share, *_ in parts for row in share])
    return batch_ops.fit_width(value, max(longest for _, longest, _ in parts))


def read_on_rank0(
    world: Channel, refs: Mapping[str, RefLike], more: T, merge: Callable[[T, T], T], limit: int | None = None
) -> tuple[dict[str, Any], T] | None:
    """Several values, and something of every rank, on rank 0, in one message up a tree; None on other ranks.

    Args:
        refs: by any names, the same on every rank.
        more: this rank's; merged in rank order by `merge`.
        limit: of row-wise values only the rows with a lower global number.
    """
    world.journal.enter(f"rank 0 reads {', '.join(refs)}")
    parts: dict[str, list[Any]] = {name: [] for name in refs}
    for name, ref in refs.items():
        if ref.rows is not None:
            part = _own_part(ref, limit)
            parts[name] = [] if part is None else [part]
        elif ref.home.mesh.ranks[0] == world.rank:
            parts[name] = [ref.value]

    def both(one: tuple[dict[str, list[Any]], T], other: tuple[dict[str, list[Any]], T]) -> Any:
        return {name: [*lower, *other[0][name]] for name, lower in one[0].items()}, merge(one[1], other[1])

    with world.timeline.span("call", STEP_END):
        collected = reduce_to_rank0(world, (parts, more), both)
        if collected is None:
            return None
        values, merged = collected
        return {n: of[0] if refs[n].rows is None else _whole(of) for n, of in values.items()}, merged
