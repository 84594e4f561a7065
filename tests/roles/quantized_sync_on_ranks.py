"""What ranks do in test_quantized_sync.py: a policy cut over two ranks is brought into engines that keep FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aligner.models.read_spec import read_spec
from aligner.reshard.config import ReshardConfig
from aligner.reshard.message.quantize import quantize_blocks
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import Sampling
from aligner.rollout.quantization import quantized_tensors, weight_bytes
from aligner.rollout.role import Rollout
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tests.rollout import tiny
from tests.rollout.vllm.fp8_stand_in import fp8_on_a_cpu
from tests.rollout.vllm.test_fp8 import CONFIG, qwen2


def check(world: World, folder: Path, tensor: int, deltas: bool) -> None:
    """A rollout of `tensor` ranks; those beside it hold nothing."""
    with fp8_on_a_cpu():
        _check(world, folder, tensor, deltas)


def _check(world: World, folder: Path, tensor: int, deltas: bool) -> None:
    model = qwen2(num_key_value_heads=4, intermediate_size=512)
    if world.rank == 0:
        tiny.save(model, folder)
    dist.barrier()
    spec, syncs = read_spec(folder), WeightSyncs(ReshardConfig(bucket_mib=1, deltas=deltas))
    settings = PolicyConfig(dtype="bfloat16")
    policy = Policy("policy", world, Mesh((0, 1), tensor=2, name="policy"), spec, settings, total_steps=1, syncs=syncs)
    mesh = Mesh(tuple(range(tensor)), tensor=tensor, name="rollout")
    rollout = Rollout("rollout", world, mesh, spec, CONFIG, Sampling(temperature=0.0, max_tokens=4), seed=0)
    tensors = tiny.tensors(model)
    for scale in (1.0, 3.0):  # the second sync overwrites the first
        values = {name: value * scale for name, value in tensors.items()}
        for piece in policy.weights.pieces():
            policy.weights.view(piece).copy_(tiny.cut(values, piece))
        policy.reshard_to(rollout)
        if rollout.member:
            _check_held(rollout, values)
    moved = [0.0, 0.0]
    dist.all_gather_object(moved, float(syncs.by_rollout["rollout"].stats[0].received_bytes))
    if (
        tensor == 1
    ):  # the other rank's half of the projections, of two copies of the embedding's halves the one that is not here
        assert sum(moved) < 0.6 * weight_bytes(spec, CONFIG), "about a byte for each weight of the other rank's half"


def _check_held(rollout: Rollout, values: dict[str, torch.Tensor]) -> None:
    expected: dict[str, Any] = dict(values)
    for name in quantized_tensors(rollout.spec, CONFIG):
        expected[name], expected[f"{name}_scale_inv"] = quantize_blocks(values[name])
    weights: Any = rollout.weights
    kept = {storage: parameter for storage, parameter in _parameters(rollout.engine.model)}  # type: ignore[union-attr]
    for piece in weights.pieces():
        held = kept[piece.storage].detach()
        if piece.name.startswith("model.layers"):  # the ends are packed for the CPU's kernels
            view = held.as_strided(piece.size, piece.stride, piece.offset)
            assert torch.equal(view.float(), tiny.cut({piece.name: expected[piece.name].float()}, piece)), piece


def _parameters(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{path}:{name}", value)
        for path, module in model.named_modules()
        for name, value in module.named_parameters(recurse=False)
    ]
