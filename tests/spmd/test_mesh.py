"""Rank arithmetic against Megatron-core's own RankGenerator, and errors that name what would work."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from aligner.config.schema import CONF, compose_config, to_config
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import RoleLayout, make_meshes, parse_ranks, usual_placement

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
        make_meshes(usual_placement(rollout=layout), 8)
    assert said in str(error.value)


def test_rules_have_no_stages() -> None:
    with pytest.raises(ValueError, match=r"placement\.reward\.pipeline=2 is not supported for reward; use 1\."):
        make_meshes(usual_placement(reward=RoleLayout(pipeline=2)), 8)


def test_the_reference_follows_the_policy() -> None:
    policy = RoleLayout(tensor=2, pipeline=2, expert=2, stage_layers=(1, 2))
    meshes = make_meshes(usual_placement(policy=policy, rollout=RoleLayout(tensor=4, expert=4)), 8)
    for role in ("policy", "reference"):
        mesh = meshes[role]
        assert (mesh.expert, mesh.expert_tensor, mesh.expert_data, mesh.stage_layers) == (2, 1, 2, (1, 2))
    assert meshes["rollout"].expert == 4


def test_any_rank_lists() -> None:
    assert parse_ranks("0-2,5", 8, "policy") == (0, 1, 2, 5)
    assert parse_ranks([3, 1], 8, "policy") == (1, 3)
    assert parse_ranks("all", 3, "policy") == (0, 1, 2)
    assert parse_ranks("0%-50%", 8, "policy") == (0, 1, 2, 3)
    assert parse_ranks("0%-25%,75%-100%", 8, "policy") == (0, 1, 6, 7)
    assert parse_ranks("7,0%-12.5%", 8, "policy") == (0, 7)


@given(st.integers(4, 300), st.lists(st.integers(1, 99), unique=True, max_size=3).map(sorted))
def test_parts_that_share_boundaries_hold_every_rank_once(world_size: int, inner: list[int]) -> None:
    bounds = [0, *inner, 100]
    parts = [range(world_size * low // 100, world_size * high // 100) for low, high in pairwise(bounds)]
    for (low, high), ranks in zip(pairwise(bounds), parts, strict=True):
        if ranks:
            assert parse_ranks(f"{low}%-{high}%", world_size, "policy") == tuple(ranks)
    assert [rank for ranks in parts for rank in ranks] == list(range(world_size))


@pytest.mark.parametrize(
    ("ranks", "world_size", "said"),
    [
        ("0%-50%", 1, "is no rank of a job of 1; start it with torchrun --nproc-per-node 2 or more"),
        ("50%-75%", 2, "is no rank of a job of 2; start it with torchrun --nproc-per-node 3 or more"),
        ("50%-20%", 4, "must go up, and to 100% at most"),
        ("50%-120%", 4, "must go up, and to 100% at most"),
        ("50%", 4, 'is not understood; use all, a list such as [0,1], ranges like "0-3,6", or parts like 0%-50%.'),
        ("0%-50%,1", 4, "none twice"),
        ("0-50%", 4, "is not understood"),
    ],
)
def test_parts_that_cannot_be(ranks: str, world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=r"placement\.policy\.ranks") as error:
        parse_ranks(ranks, world_size, "policy")
    assert said in str(error.value)


OPTIONS = sorted(file.stem for file in (CONF / "placement").glob("*.yaml"))


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_placement_works_for_any_world(option: str, world_size: int) -> None:
    config = to_config(compose_config(["model.path=x", f"placement={option}"]))
    meshes = make_meshes(config.placement, world_size)
    assert {rank for mesh in meshes.values() for rank in mesh.ranks} == set(range(world_size)), "ranks without a role"
    if option == "colocated":
        assert {mesh.ranks for mesh in meshes.values()} == {tuple(range(world_size))}
        return
    learn, answer = tuple(range(world_size // 2)), tuple(range(world_size // 2, world_size))
    frozen = answer if option == "split" else learn
    assert {role: mesh.ranks for role, mesh in meshes.items()} == {
        "policy": learn, "critic": learn, "rollout": answer, "reward": answer, "reference": frozen, "reward_model": frozen,
    }  # fmt: skip


def test_split_cuts_frozen_models_like_the_policy() -> None:
    sizes = ["placement.policy.tensor=2", "placement.policy.pipeline=2", "placement.policy.stage_layers=[1,3]"]
    config = to_config(compose_config(["model.path=x", "placement=split", *sizes]))
    meshes = make_meshes(config.placement, 8)
    for role in ("policy", "reference", "reward_model"):
        assert (meshes[role].tensor, meshes[role].pipeline, meshes[role].stage_layers) == (2, 2, (1, 3)), role
