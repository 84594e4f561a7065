"""Values between roles on real gloo ranks: any mix of shared and disjoint ranks gives the reader its rows."""

from __future__ import annotations

import pytest

PROGRAM = """
import torch
from aligner.data.samples import Samples
from aligner.spmd.mesh import Mesh
from aligner.spmd.partition import partition
from aligner.spmd.ref import Ref
from aligner.spmd.rows import Rows
from aligner.spmd.role import Role
from aligner.spmd.world import World

world = World(60)
LENGTHS = [5, 9, 3, 7, 4, 4, 8, 2]
GROUP = 2

def whole():
    tokens = torch.zeros(8, 9, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        tokens[row, :n] = torch.arange(n) + 100 * row
    mask = tokens > 0
    return Samples(tokens, torch.ones(8, dtype=torch.long), torch.tensor(LENGTHS), mask, torch.arange(8),
                   [{"row": row} for row in range(8)], rollout_logp_BT=tokens.float() / 7)

LAYOUTS = {
    "a": (Mesh((0,)), Mesh((1,))),
    "b": (Mesh((0, 1)), Mesh((0, 1), tensor=2)),
    "c": (Mesh((0, 1), tensor=2), Mesh((0, 1))),
    "d": (Mesh((0, 1), tensor=2), Mesh((2, 3))),
    "e": (Mesh((0, 1, 2)), Mesh((1, 2, 3), pipeline=3)),
    "f": (Mesh((0, 1, 2, 3)), Mesh((3,))),
    "g": (Mesh((2,)), Mesh((0, 1, 2, 3), tensor=2)),
}
everything = whole()
for name, (left, right) in LAYOUTS.items():
    if max(left.ranks + right.ranks) >= world.size:
        continue
    one, two = Role("one" + name, world, left), Role("two" + name, world, right)
    # the source's lengths are known to its own ranks only, as after generation
    ref = one.scatter(everything, group_size=GROUP)
    ref.rows.known = set(left.ranks)
    if not one.member:
        ref.rows.lengths = None
    def doubled(samples, factor):
        assert samples.tokens_BT.shape[1] == (int(samples.length_B.max()) if samples.rows else 0)
        assert [f["row"] for f in samples.fields] == samples.prompt_index_B.tolist()
        return samples.tokens_BT * factor
    out = two.map(doubled, ref, factor=2)
    if two.member:
        share = partition(LENGTHS, right.data, GROUP)[two.shard]
        expected = everything.tokens_BT[list(share)] * 2
        assert torch.equal(out.value, expected[:, : out.value.shape[1]]), name
    back = one.map(lambda samples, value: value, ref, out)      # and back to its first home
    got = back.gather()
    assert torch.equal(got, everything.tokens_BT * 2), name
    assert torch.equal(ref["rollout_logp_BT"].gather(), everything.rollout_logp_BT), name
    number = Ref(two, {"loss": 1.5} if two.member else None)
    assert number.gather() == {"loss": 1.5}
    # fewer groups than shards: an empty share still has its type
    few = one.scatter(Samples(everything.tokens_BT[:2], everything.prompt_len_B[:2], everything.length_B[:2],
                            everything.mask_BT[:2], everything.prompt_index_B[:2], everything.fields[:2]), GROUP)
    n = two.map(lambda samples: samples.length_B, few)
    assert n.gather().tolist() == LENGTHS[:2], name
    for wrong in (lambda: bool(ref), lambda: len(ref), lambda: list(ref), lambda: ref == 1, lambda: float(ref), lambda: ref[0]):
        try:
            wrong()
        except TypeError as error:
            assert "ref.gather()" in str(error)
        else:
            raise AssertionError("a Ref was branched on")
    print(f"layout {name} ok\\n", end="", flush=True)
world.leave()
"""


@pytest.mark.parametrize(("ranks", "layouts"), [(2, "abc"), (4, "abcdefg")])
def test_rows_arrive_under_any_layout(torchrun, ranks: int, layouts: str) -> None:  # type: ignore[no-untyped-def]
    done = torchrun(ranks, PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in layouts:
        assert done.stdout.count(f"layout {name} ok") == ranks
