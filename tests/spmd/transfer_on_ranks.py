"""What ranks do in the tests of values that go from role to role: two roles on meshes of any form, and eight rows of text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.spmd.mesh import Mesh
from aligner.spmd.partition import partition
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World

LENGTHS = [5, 9, 3, 7, 4, 4, 8, 2]
GROUP = 2


def batch() -> Samples:
    """Every token says its row and its place."""
    tokens_BT = torch.zeros(8, 9, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        tokens_BT[row, :length] = torch.arange(length) + 100 * row
    return Samples(
        tokens_BT,
        torch.ones(8, dtype=torch.long),
        torch.tensor(LENGTHS),
        tokens_BT > 0,
        torch.arange(8),
        [{"row": row} for row in range(8)],
        rollout_logp_BT=tokens_BT.float() / 7,
    )


def scattered(source: Role, samples: Samples) -> Ref:
    """Rows of `source`, whose lengths its own ranks alone know, as after generation."""
    ref = source.scatter(samples, group_size=GROUP)
    assert ref.rows is not None
    ref.rows.known = set(source.mesh.ranks)
    if not source.member:
        ref.rows.lengths = None
    return ref


def check_rows_arrive(world: World, source_mesh: Mesh, reader_mesh: Mesh) -> None:
    """A reader computes on its share of the rows, and what it made goes back to their first home."""
    source, reader, samples = Role("source", world, source_mesh), Role("reader", world, reader_mesh), batch()
    ref = scattered(source, samples)

    def multiplied(samples: Samples, factor: int) -> Tensor:
        assert samples.tokens_BT.shape[1] == (int(samples.length_B.max()) if samples.rows else 0)
        assert [fields["row"] for fields in samples.fields] == samples.prompt_index_B.tolist()
        return samples.tokens_BT * factor

    made = reader.map(multiplied, ref, factor=2)
    if reader.member:
        assert reader.shard is not None
        rows = partition(LENGTHS, reader_mesh.data, GROUP)[reader.shard]
        expected_BT = samples.tokens_BT[list(rows)] * 2
        assert torch.equal(made.value, expected_BT[:, : made.value.shape[1]])
    back = source.map(lambda samples, value: value, ref, made)
    assert torch.equal(back.gather(), samples.tokens_BT * 2)
    assert torch.equal(ref["rollout_logp_BT"].gather(), samples.rollout_logp_BT)


def check_value_without_rows(world: World, source_mesh: Mesh, reader_mesh: Mesh) -> None:
    """Metrics, which every rank reads."""
    reader = Role("reader", world, reader_mesh)
    assert Ref(reader, {"loss": 1.5} if reader.member else None).gather() == {"loss": 1.5}


def check_fewer_groups_than_shards(world: World, source_mesh: Mesh, reader_mesh: Mesh) -> None:
    """An empty share still has its type."""
    source, reader, samples = Role("source", world, source_mesh), Role("reader", world, reader_mesh), batch()
    few = Samples(
        samples.tokens_BT[:2],
        samples.prompt_len_B[:2],
        samples.length_B[:2],
        samples.mask_BT[:2],
        samples.prompt_index_B[:2],
        samples.fields[:2],
    )
    length_B = reader.map(lambda samples: samples.length_B, source.scatter(few, GROUP))
    assert length_B.gather().tolist() == LENGTHS[:2]


def check_no_rank_branches_on_a_ref(world: World, source_mesh: Mesh, reader_mesh: Mesh) -> None:
    """On no rank, also not where the value is."""
    ref = scattered(Role("source", world, source_mesh), batch())
    uses = (
        lambda: bool(ref), lambda: len(ref), lambda: list(ref), lambda: ref == 1, lambda: float(ref), lambda: ref[0],
    )  # fmt: skip
    for use in uses:
        with pytest.raises(TypeError, match=r"ref\.gather\(\)"):
            use()
