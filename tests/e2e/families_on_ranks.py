"""What ranks do in test_families.py: real policies brought to real engines three times, against engines that loaded the same."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import aligner.rollout.vllm.engine as engine_module
from aligner.models.read_spec import read_spec
from aligner.models.tensors import logical_tensors
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import Sampling
from aligner.rollout.requests import Sample
from aligner.rollout.role import Rollout
from aligner.rollout.vllm.engine import VllmEngine
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tests.rollout import tiny

tiny.EXPERTS = 4  # Megatron deals experts out evenly
GREEDY = Sampling(temperature=0.0, max_tokens=16, stop_token_ids=())
DRAWN = Sampling(temperature=1.0, max_tokens=16, stop_token_ids=())
SYNCS = 3


def check(world: World, root: Path, case: str, fresh: int) -> None:
    """After each sync: tokens and log-probabilities, to the last bit, of an engine that loaded the same weights.

    Args:
        root: a folder for checkpoints.
        case: family:dtype:rollout tensor size:colocated or split.
        fresh: how many of the three syncs are compared with a fresh engine.
    """
    family, dtype, size, where = case.split(":")
    tensor, folder = int(size), root / case.replace(":", "-")
    model = tiny.make_model(family, 3)
    save(world, model, folder)
    spec = read_spec(folder)
    everyone = tuple(range(world.size))
    half = everyone[: world.size // 2] if where == "split" else everyone
    # The policy is cut otherwise than the engines: along heads, experts or layers.
    sizes = {"tensor": 2} if tensor == 1 else {"expert": 2} if spec.experts else {"pipeline": 2}
    parallel = bool(spec.experts) and "tensor" in sizes  # Megatron wants it of experts
    policy_mesh = Mesh(half, **sizes, name="policy")
    policy = Policy(
        "policy",
        world,
        policy_mesh,
        spec,
        PolicyConfig(dtype="float32"),
        sequence_parallel=parallel,
        total_steps=1,
        syncs=WeightSyncs(),
    )
    others = everyone[world.size // 2 :] if where == "split" else everyone
    mesh = Mesh(others, tensor=tensor, name="rollout")
    config = replace(tiny.CONFIG, dtype=dtype)
    rollout = Rollout("rollout", world, mesh, spec, config, DRAWN, seed=0)
    answers = []
    for sync in range(SYNCS):
        torch.manual_seed(10 + sync)
        tiny.randomize(model)
        if policy.member:
            tensors = tiny.tensors(model)
            assert set(tensors) == set(logical_tensors(spec))
            for piece in policy.weights.pieces():
                policy.weights.view(piece).data.copy_(tiny.cut(tensors, piece))
        policy.reshard_to(rollout)
        answers.append(ask(rollout.engine) if rollout.member else None)
        save(world, model, folder.with_name(f"{folder.name}-{sync}"))
    if world.rank in (*half, *others):
        rows = policy.syncs.by_rollout["rollout"].stats
        told: list[object] = [None] * world.size
        dist.all_gather_object(told, [(row.moved_bytes, row.minimum_bytes) for row in rows])
        for sync in range(SYNCS):
            moved, least = (sum(rank[sync][which] for rank in told) for which in (0, 1))  # type: ignore[index]
            assert moved == least > 0, f"{moved} bytes moved, {least} needed"
    for close in world._closers:
        close()
    world._closers.clear()
    for sync in range(SYNCS - fresh, SYNCS):
        if rollout.member:
            group = world.my_group(mesh.groups("tensor"))
            answer = stock(folder.with_name(f"{folder.name}-{sync}"), group, f"fresh{others[0]}", config)
            assert answer == answers[sync], (
                f"{family}, sync {sync}: differs from an engine that loaded the same weights"
            )
    assert answers[0] != answers[1] or not rollout.member


def save(world: World, model: object, folder: Path) -> None:
    if world.rank == 0:
        tiny.save(model, folder)
    dist.barrier()


def stock(folder: Path, group: dist.ProcessGroup | None, ident: str, config: object) -> list[list[Sample]]:
    """What an engine answers that has loaded the checkpoint by itself."""
    assert group is not None
    engine_module.LOAD_FORMAT = "auto"
    engine = VllmEngine(folder, group, f"{ident}-{os.getppid()}-{dist.get_rank()}", config, torch.device("cpu"))  # type: ignore[arg-type]
    engine_module.LOAD_FORMAT = "dummy"
    engine.loaded.finish()
    answer = ask(engine)
    engine.close()
    return answer


def ask(engine: VllmEngine) -> list[list[Sample]]:
    asked = tiny.prompts(4)
    return [group for how in (GREEDY, DRAWN) for group in engine.generate(asked, [7, 107, 207, 307], how)]
