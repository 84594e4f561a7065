"""What ranks do in the tests of messages by trees: what arrives, and how many messages each rank sends for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from aligner.data.samples import Samples
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import all_gather, broadcast, exchange, reduce_to_rank0
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.serialization import deserialize, serialize
from aligner.spmd.transfer import read_on_rank0
from aligner.spmd.world import World


@contextmanager
def sent_messages() -> Iterator[list[int]]:
    """The peer of each message that this rank sends."""
    peers: list[int] = []
    isend = dist.isend

    def noted(message: torch.Tensor, peer: int, *arguments: Any, **more: Any) -> Any:
        peers.append(peer)
        return isend(message, peer, *arguments, **more)

    with patch.object(dist, "isend", noted):
        yield peers


def check_exchange(world: World, size: int) -> None:
    """A payload of `size` bytes between any two ranks, in both directions at once."""
    peers = [peer for peer in range(world.size) if peer != world.rank]
    outgoing = {peer: serialize((world.rank, b"x" * size)) for peer in peers}
    received = exchange(world, outgoing, peers)
    assert {peer: deserialize(data) for peer, data in received.items()} == {peer: (peer, b"x" * size) for peer in peers}


def check_all_gather(world: World, ranks: Sequence[int], messages: int) -> None:
    """Values of `ranks`, for each of which a rank sends so many `messages`."""
    if world.rank not in ranks:
        return
    value = {"rank": world.rank, "tensor": torch.full((2,), world.rank), "same": "for all"}
    with sent_messages() as sent:
        gathered = all_gather(world, value, ranks)
    assert [one["rank"] for one in gathered] == ranks
    assert [one["tensor"].tolist() for one in gathered] == [[rank, rank] for rank in ranks]
    assert all(one["same"] == "for all" for one in gathered)
    assert len(sent) == messages, sent
    assert all_gather(world, "equal", ranks) == ["equal"] * len(ranks)


def check_broadcast(world: World, holders: Sequence[int], readers: Sequence[int]) -> None:
    with sent_messages() as sent:
        value = broadcast(world, torch.tensor([7]) if world.rank in holders else None, holders, readers)
    assert (value is not None) == (world.rank in holders or world.rank in readers)
    assert value is None or value.tolist() == [7]
    assert len(sent) <= 3, sent


def check_reduce(world: World) -> None:
    with sent_messages() as sent:
        merged = reduce_to_rank0(world, [world.rank], lambda one, other: one + other)
    assert merged == (list(range(world.size)) if world.rank == 0 else None)
    assert len(sent) == (world.rank != 0), sent


def rows_and_number(world: World) -> tuple[Role, Ref]:
    """A role on rank 3, and rows of another on ranks 1 to 4 (two shards of two)."""
    rows, number = Role("rows", world, Mesh((1, 2, 3, 4), tensor=2)), Role("number", world, Mesh((3,)))
    length_B = torch.tensor([3, 1, 2, 2])
    tokens_BT, fields = torch.ones(4, 3, dtype=torch.long), [{"row": row} for row in range(4)]
    return number, rows.scatter(Samples(tokens_BT, length_B, length_B, tokens_BT > 0, torch.arange(4), fields))


def check_read_at_first(world: World) -> None:
    """Rows and a value of other ranks, and the greatest of a number of each rank, read on rank 0: one message each."""
    number, ref = rows_and_number(world)
    metrics = number.map(lambda: {"loss": 0.5})
    values = {"index": ref["prompt_index_B"], "fields": ref["fields"], "metrics": metrics}
    with sent_messages() as sent:
        read = read_on_rank0(world, values, world.rank, max)
    assert len(sent) == (world.rank != 0), sent
    if world.rank:
        assert read is None
    else:
        assert read is not None
        assert read[0]["index"].tolist() == [0, 1, 2, 3] and read[0]["fields"] == [{"row": row} for row in range(4)]
        assert read[0]["metrics"] == {"loss": 0.5} and read[1] == 4


def check_read_at_first_with_a_limit(world: World) -> None:
    _, ref = rows_and_number(world)
    read = read_on_rank0(world, {"index": ref["prompt_index_B"]}, 0, max, limit=3)
    assert (read is None) == (world.rank != 0)
    assert read is None or read[0]["index"].tolist() == [0, 1, 2]


def check_nothing_travels_twice(world: World) -> None:
    """What was read once, and its fields, do not travel again: rank 3 learns the other shard's rows, in one message."""
    number, ref = rows_and_number(world)
    with sent_messages() as sent:
        for _ in range(2):
            assert number.map(lambda samples: samples.prompt_index_B, ref).rows is ref.rows
            number.map(lambda index_B, fields: index_B, ref["prompt_index_B"], ref["fields"])
    total = torch.tensor(len(sent))
    dist.all_reduce(total)
    assert int(total) == 1, int(total)
    assert torch.equal(ref.gather().prompt_index_B, torch.arange(4))
