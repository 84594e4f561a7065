"""Messages by trees on real ranks, whose number is no power of two: every value arrives, and no rank sends many."""

from __future__ import annotations

PROGRAM = """
import torch
import torch.distributed as dist
from aligner.data.samples import Samples
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import all_gather, exchange, reduce_to_rank0, broadcast
from aligner.spmd.serialization import pack, unpack
from aligner.spmd.role import Role
from aligner.spmd.transfer import read_on_rank0
from aligner.spmd.world import World

world = World(60)
rank, sent = world.rank, [0]
isend = dist.isend
def counted(*args, **kwargs):
    sent[0] += 1
    return isend(*args, **kwargs)
dist.isend = counted

# payloads on both sides of what travels with its header, in both directions at once
for size in (0, 1, 4031, 4032, 4033, 200_000):
    peers = [p for p in range(5) if p != rank]
    got = exchange(world, {p: pack((rank, b"x" * size)) for p in peers}, peers)
    assert {p: unpack(data) for p, data in got.items()} == {p: (p, b"x" * size) for p in peers}, size

for ranks in ([0, 1, 2, 3, 4], [1, 3, 4], [2], [0, 4]):
    if rank in ranks:
        sent[0] = 0
        value = {"rank": rank, "tensor": torch.full((2,), rank), "same": "for all"}
        found = all_gather(world, value, ranks)
        assert [one["rank"] for one in found] == ranks
        assert [one["tensor"].tolist() for one in found] == [[r, r] for r in ranks]
        assert sent[0] == {5: 3, 3: 2, 2: 1, 1: 0}[len(ranks)], "log2 of the ranks, rounded up"
    assert all_gather(world, "equal", ranks) == ["equal"] * len(ranks) if rank in ranks else True

for holders, readers in (([3], range(5)), ([1, 2], [0, 3, 4]), ([0, 1, 2, 3, 4], [2]), ([4], [0])):
    sent[0] = 0
    got = broadcast(world, torch.tensor([7]) if rank in holders else None, holders, readers)
    assert (got is not None) == (rank in holders or rank in readers), (holders, rank)
    assert got is None or got.tolist() == [7]
    assert sent[0] <= 3

sent[0] = 0
merged = reduce_to_rank0(world, [rank], lambda one, other: one + other)
assert merged == ([0, 1, 2, 3, 4] if rank == 0 else None)
assert sent[0] == (rank != 0)

# rows of a role on ranks 1 to 4 (two shards of two) and a value of one on rank 3, read on rank 0 with one message each
rows, number = Role("rows", world, Mesh((1, 2, 3, 4), tensor=2)), Role("number", world, Mesh((3,)))
one = torch.tensor([3, 1, 2, 2])
samples = Samples(torch.ones(4, 3, dtype=torch.long), one, one, torch.ones(4, 3) > 0, torch.arange(4), [{"row": i} for i in range(4)])
ref = rows.scatter(samples)
metrics = number.map(lambda: {"loss": 0.5})
sent[0] = 0
found = read_on_rank0(world, {"index": ref["prompt_index_B"], "fields": ref["fields"], "metrics": metrics}, rank, max)
assert sent[0] == (rank != 0)
if rank:
    assert found is None
else:
    values, most = found
    assert values["index"].tolist() == [0, 1, 2, 3] and values["fields"] == [{"row": i} for i in range(4)]
    assert values["metrics"] == {"loss": 0.5} and most == 4
found = read_on_rank0(world, {"index": ref["prompt_index_B"]}, 0, max, limit=3)
assert found is None or found[0]["index"].tolist() == [0, 1, 2]

# what was read once does not travel again, nor do its fields
sent[0] = 0
for _ in range(2):
    assert number.map(lambda s: s.prompt_index_B, ref).rows is ref.rows
    number.map(lambda index_B, fields: index_B, ref["prompt_index_B"], ref["fields"])
total = torch.tensor(sent[0])
dist.all_reduce(total)
# rank 3 learns the rows of the other shard, in one message
assert int(total) == 1, int(total)
assert torch.equal(ref.gather().prompt_index_B, torch.arange(4))
print("all ok\\n", end="", flush=True)
world.leave()
"""


def test_trees(torchrun) -> None:  # type: ignore[no-untyped-def]
    done = torchrun(5, PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all ok") == 5
