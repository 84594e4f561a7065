"""What ranks do in test_replicas.py: rank 0 holds the weights and makes no engine; ranks 1 and 2 are the replicas.

The weights travel by the real plan and executor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from aligner.reshard.plan.region import Piece, whole_tensor
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.transfer.executor import execute
from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.world import World
from tests.rollout import tiny

SOURCE = 0
SAMPLINGS = (
    Sampling(temperature=0.0, max_tokens=20, stop_token_ids=()),
    Sampling(temperature=1.0, max_tokens=20, stop_token_ids=()),
)


def sample(world: World, path: str, replicas: Sequence[Sequence[int]]) -> list[list[list[int]]] | None:
    """Start engines on these ranks, move weights to them twice, check against transformers; the sampled tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    group, ident = world.my_group(replicas), f"test-{os.getppid()}"
    engine = weights = None
    if group is not None:
        engine = VllmEngine(path, group, ident, tiny.CONFIG, torch.device("cpu"))
        weights = EngineWeights(engine)
    for seed in (5, 6):
        torch.manual_seed(seed)
        tiny.randomize(model)
        _move(world, model, weights)
    _check_world(world)
    tokens = _check(engine, model) if engine is not None else None
    if engine is not None:
        engine.close()
    _check_world(world)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(ident)]
    return tokens


def _move(world: World, model: Any, weights: EngineWeights | None) -> None:
    tensors = tiny.tensors(model)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    wanted: list[Piece] = weights.pieces() if weights is not None else []
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, wanted)
    held = [whole_tensor(name, shape, "float32") for name, shape in shapes.items()]
    plan = plan_transfer(world.rank, {SOURCE: held}, {rank: pieces for rank, pieces in enumerate(gathered) if pieces})
    row = execute(plan, lambda piece: tiny.cut(tensors, piece), weights, dist.group.WORLD, torch.device("cpu"), 1 << 16)
    assert row.received_bytes == row.minimum_bytes
    assert (row.checksummed > 0) == (weights is not None)


def _check(engine: VllmEngine, model: Any) -> list[list[list[int]]]:
    asked = tiny.prompts(5)
    tokens = []
    for sampling in SAMPLINGS:
        groups = engine.generate(asked, [100 * index for index in range(5)], sampling, 2)
        for prompt, group in zip(asked, groups, strict=True):
            assert max(tiny.gap(model, prompt, one) for one in group) < 1e-4
            if sampling.temperature == 0:
                assert group[0].tokens == tiny.greedy(model, prompt, 20)
        tokens.append([one.tokens for group in groups for one in group])
    return tokens


def _check_world(world: World) -> None:
    """The engines have left its collectives alone."""
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total)
    assert total.item() == sum(range(world.size))
    pair = dist.new_group([0, 2])  # names of later groups agree on all ranks
    if world.rank in (0, 2):
        dist.all_reduce(total, group=pair)
        assert total.item() == 2 * sum(range(world.size))
    dist.barrier()
