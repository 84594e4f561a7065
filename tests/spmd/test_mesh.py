"""Rank arithmetic against Megatron-core's own RankGenerator, and errors that name what would work."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator

from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import Placement, RoleLayout, make_meshes, parse_ranks

DENSE = {"tensor": "tp", "pipeline": "pp", "context": "cp", "data": "dp"}
SIZES = [(2, 1, 1, 4), (2, 2, 1, 2), (1, 4, 1, 2), (2, 2, 2, 2), (4, 1, 2, 1), (1, 1, 1, 8), (2, 3, 1, 2)]


@pytest.mark.parametrize(("tensor", "pipeline", "context", "data"), SIZES)
def test_groups_are_megatrons(tensor: int, pipeline: int, context: int, data: int) -> None:
    size = tensor * pipeline * context * data
    ranks = tuple(range(3, 3 + 2 * size, 2))  # neither contiguous nor from 0
    mesh = Mesh(ranks, tensor, pipeline, context)
    theirs = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    for vary in (["tensor"], ["pipeline"], ["data"], ["context"], ["tensor", "pipeline"], ["context", "data"]):
        expected = theirs.get_ranks("-".join(DENSE[axis] for axis in vary))
        found = {frozenset(group) for group in mesh.groups(*vary)}
        assert found == {frozenset(ranks[i] for i in group) for group in expected}, vary
    for group in mesh.groups("pipeline"):
        assert [mesh.coordinates(rank)["pipeline"] for rank in group] == list(range(pipeline))


@pytest.mark.parametrize(
    ("tensor", "expert", "expert_tensor", "pipeline", "ranks"),
    [(2, 2, 2, 1, 8), (1, 4, 1, 2, 8), (2, 2, 2, 2, 8), (2, 2, 1, 1, 4), (2, 4, 1, 2, 16), (4, 2, 2, 1, 8)],
)
def test_expert_groups_are_megatrons(tensor: int, expert: int, expert_tensor: int, pipeline: int, ranks: int) -> None:
    mesh = Mesh(tuple(range(ranks)), tensor, pipeline, expert=expert, expert_tensor=expert_tensor)
    data = ranks // (expert_tensor * expert * pipeline)
    theirs = RankGenerator(tp=expert_tensor, ep=expert, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    for mine, their in (("expert", "ep"), ("expert_tensor", "tp"), ("expert_data", "dp"), ("pipeline", "pp")):
        assert {frozenset(g) for g in mesh.groups(mine)} == {frozenset(g) for g in theirs.get_ranks(their)}, mine


def test_experts_are_not_cut_where_they_are_spread() -> None:
    assert Mesh((0, 1, 2, 3), tensor=2, expert=2).expert_tensor == 1
    assert Mesh((0, 1, 2, 3), tensor=2).expert_tensor == 2
    # by hand: tensor pairs 0,1 | 2,3; experts' shards 0 on ranks 0, 2 and 1 on ranks 1, 3
    assert Mesh((0, 1, 2, 3), tensor=2, expert=2).groups("expert_data") == ((0, 2), (1, 3))


def test_shards_hold_every_rank_once() -> None:
    mesh = Mesh((0, 1, 2, 3, 4, 5, 6, 7), tensor=2, pipeline=2)
    # by hand: ranks 0,1 | 2,3 are data shards 0 | 1 of stage 0; 4,5 | 6,7 of stage 1
    assert mesh.shards == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert mesh.shard_of(6) == 1
    assert mesh.shard_of(9) is None


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (RoleLayout(ranks="0-5", tensor=4), "placement.rollout.tensor=4 does not divide its 6 rank(s)"),
        (RoleLayout(ranks="0-5", tensor=4), "use 1, 2, 3 or 6"),
        (RoleLayout(ranks=[0, 9]), "names rank(s) [9], but the job has 8 rank(s)"),
        (RoleLayout(ranks=[1, 1]), "none twice"),
        (RoleLayout(ranks="a-b"), "is not understood"),
        (RoleLayout(tensor=0), "placement.rollout.tensor=0 must be at least 1"),
        (RoleLayout(stage_layers=(1, 2)), "placement.rollout.stage_layers=(1, 2) is not supported for rollout; use []"),
        (RoleLayout(virtual_pipeline=2), "virtual_pipeline=2 is not supported for rollout; use 1"),
        (RoleLayout(tensor=2, expert_tensor=2), "expert_tensor=2 is not supported for rollout; use null"),
        (RoleLayout(expert_tensor=0), "placement.rollout.expert_tensor=0 must be at least 1"),
        (RoleLayout(tensor=4, expert=2), "placement.rollout.expert=2 is not supported for rollout; use 1, or 4"),
        (RoleLayout(expert=3), "placement.rollout.expert=3 does not divide the 8 rank(s) of a pipeline stage"),
        (RoleLayout(context=2), "placement.rollout.context=2 is not supported for rollout; use 1"),
    ],
)
def test_errors_name_the_setting(layout: RoleLayout, said: str) -> None:
    with pytest.raises(ValueError, match=r"placement\.rollout") as error:
        make_meshes(Placement(rollout=layout), 8)
    assert said in str(error.value)


def test_rules_have_no_stages() -> None:
    with pytest.raises(ValueError, match=r"placement\.reward\.pipeline=2 is not supported for reward; use 1\."):
        make_meshes(Placement(reward=RoleLayout(pipeline=2)), 8)


def test_the_reference_follows_the_policy() -> None:
    policy = RoleLayout(tensor=2, pipeline=2, expert=2, stage_layers=(1, 2))
    meshes = make_meshes(Placement(policy=policy, rollout=RoleLayout(tensor=4, expert=4)), 8)
    for role in ("policy", "reference"):
        mesh = meshes[role]
        assert (mesh.expert, mesh.expert_tensor, mesh.expert_data, mesh.stage_layers) == (2, 1, 2, (1, 2))
    assert meshes["rollout"].expert == 4


def test_any_rank_lists() -> None:
    assert parse_ranks("0-2,5", 8, "policy") == (0, 1, 2, 5)
    assert parse_ranks([3, 1], 8, "policy") == (1, 3)
    assert parse_ranks("all", 3, "policy") == (0, 1, 2)
