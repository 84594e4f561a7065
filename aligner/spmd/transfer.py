"""Values move peer to peer from the ranks that hold rows to the ranks that read them; nothing passes a controller.

Every rank issues the same transfers in the same order (lockstep), and within one transfer all receives are posted
before anything is waited for, so no two ranks can wait for each other. Each message carries the sender's call number
and its digest: a rank that is somewhere else in the loop is found at the first message.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aligner.spmd import columns
from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import Shares, partition
from aligner.spmd.ref import Ref, Rows

if TYPE_CHECKING:
    from aligner.spmd.role import Role
    from aligner.spmd.world import World

Moves = dict[tuple[int, int], list[int]]
"""(source rank, destination rank) -> global rows to move, ascending. Equal ranks: a local copy."""


def plan_moves(
    sources: Shares, source_ranks: Sequence[Sequence[int]], targets: Shares, target_ranks: Sequence[Sequence[int]]
) -> Moves:
    """Who sends which rows to whom: pure. A rank that holds a row already reads its own copy.

    Args:
        sources, targets: rows of each shard on the two sides.
        source_ranks, target_ranks: world ranks that hold (need) each shard.
    """
    holders = {row: ranks for share, ranks in zip(sources, source_ranks, strict=True) for row in share}
    moves: Moves = {}
    turn = 0
    everywhere = [rank for ranks in source_ranks for rank in ranks]
    for share, readers in zip(targets, target_ranks, strict=True):
        for reader in readers:
            if not share:  # an empty share still learns the value's type: one message of no rows
                moves[(reader if reader in everywhere else everywhere[turn % len(everywhere)], reader)] = []
            for row in share:
                ranks = holders[row]
                # replicas take turns, so that no single tensor-parallel rank sends everything
                source = reader if reader in ranks else ranks[turn % len(ranks)]
                moves.setdefault((source, reader), []).append(row)
            turn += 1
    return moves


def exchange(world: World, outgoing: Mapping[int, bytes], incoming: Sequence[int]) -> dict[int, bytes]:
    """Send `outgoing[peer]`, receive one message from each rank of `incoming`. Host memory, gloo."""
    peers = sorted({*outgoing, *incoming})
    if not peers:
        return {}
    with world.timeline.span("wait", "values", peers):
        return _exchange(world, outgoing, incoming)


def _exchange(world: World, outgoing: Mapping[int, bytes], incoming: Sequence[int]) -> dict[int, bytes]:
    stamp = world.journal.stamp()
    sizes = {peer: torch.zeros(3, dtype=torch.int64) for peer in incoming}
    pending: list[Any] = [dist.irecv(size, peer) for peer, size in sizes.items()]
    kept = []
    for peer, payload in outgoing.items():
        size = torch.tensor([len(payload), *stamp], dtype=torch.int64)
        body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        kept.append((size, body))
        pending += [dist.isend(size, peer), dist.isend(body, peer)]
    bodies = {}
    for peer, work in zip(list(sizes), pending[: len(sizes)], strict=True):
        work.wait()
        length, *theirs = sizes[peer].tolist()
        if tuple(theirs) != stamp:
            world.journal.disagree(peer, theirs[0])
        bodies[peer] = torch.empty(length, dtype=torch.uint8)
        pending.append(dist.irecv(bodies[peer], peer))
    for work in pending[len(sizes) :]:
        work.wait()
    return {peer: body.numpy().tobytes() for peer, body in bodies.items()}


def learn_lengths(world: World, rows: Rows, readers: Sequence[int]) -> None:
    """Bring `rows.lengths` to every reader that has not got it; senders take turns. Every rank of the world calls it."""
    tellers = sorted(rows.known)
    pairs = [(tellers[i % len(tellers)], reader) for i, reader in enumerate(r for r in readers if r not in rows.known)]
    rows.known.update(readers)
    outgoing = {to: pickle.dumps(rows.lengths) for teller, to in pairs if teller == world.rank}
    got = exchange(world, outgoing, [teller for teller, to in pairs if to == world.rank])
    for payload in got.values():
        rows.lengths = pickle.loads(payload)


def read_rows(
    ref: Ref, readers: Sequence[Sequence[int]], minibatches: int = 1, cost: Cost = TOKENS
) -> tuple[Any, tuple[int, ...]]:
    """This rank's rows of `ref` under the partition over `readers` (ranks of each reading shard).

    Returns:
        (value, global rows), both None/() on a rank that does not read. [B, T] fields come as wide as the longest
        row of the share, whatever padding they had at home.
    """
    world = ref.home.world
    rows = ref.rows
    assert rows is not None
    everyone = sorted({rank for ranks in readers for rank in ranks})
    if world.rank not in everyone and not ref.home.member:
        rows.known.update(everyone)
        return None, ()
    learn_lengths(world, rows, everyone)
    assert rows.lengths is not None
    targets = partition(rows.lengths, len(readers), rows.group_size, minibatches, cost)
    moves = plan_moves(ref.shares, ref.home.mesh.shards, targets, readers)
    held = (
        {row: i for i, row in enumerate(ref.shares[ref.home.mesh.shard_of(world.rank) or 0])} if ref.home.member else {}
    )
    outgoing = {
        to: pickle.dumps(columns.take(ref.value, [held[row] for row in wanted]), protocol=5)
        for (source, to), wanted in moves.items()
        if source == world.rank and to != world.rank
    }
    received = exchange(world, outgoing, [s for (s, to) in moves if to == world.rank and s != world.rank])
    mine = next((share for share, ranks in zip(targets, readers, strict=True) if world.rank in ranks), None)
    if mine is None:
        return None, ()
    parts, order = [], []
    for (source, to), wanted in moves.items():
        if to == world.rank:
            here = source == world.rank
            parts.append(columns.take(ref.value, [held[r] for r in wanted]) if here else pickle.loads(received[source]))
            order += wanted
    back = sorted(range(len(order)), key=order.__getitem__)
    value = columns.take(columns.join(parts), back)
    return columns.fit(value, max((rows.lengths[row] for row in mine), default=0)), mine


def read_value(ref: Ref, readers: Sequence[int]) -> Any:
    """A value that is not row-wise, on each of `readers`; home ranks take turns to send it."""
    world = ref.home.world
    home = ref.home.mesh.ranks
    pairs = [(home[i % len(home)], reader) for i, reader in enumerate(r for r in readers if r not in home)]
    outgoing = {to: pickle.dumps(ref.value, protocol=5) for source, to in pairs if source == world.rank}
    got = exchange(world, outgoing, [source for source, to in pairs if to == world.rank])
    if ref.home.member:
        return ref.value
    return next((pickle.loads(payload) for payload in got.values()), None)


def read(ref: Ref, reader: Role, minibatches: int = 1) -> tuple[Any, tuple[int, ...]]:
    """`ref` as `reader` needs it on this rank: (value, global rows)."""
    if ref.rows is None:
        return read_value(ref, reader.mesh.ranks), ()
    return read_rows(ref, reader.mesh.shards, minibatches, reader.cost)


def read_everywhere(ref: Ref) -> Any:
    """The whole value on every rank of the world."""
    world = ref.home.world
    world.journal.enter(f"get() of a value from {ref.home.name}")
    if ref.rows is None:
        return read_value(ref, range(world.size))
    return read_rows(ref, [tuple(range(world.size))])[0]
