"""Grouped experts beside Megatron's own, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.megatron.cpu import install
from aligner.trainer.megatron.grouped_experts import GroupedExperts
from aligner.trainer.megatron.groups import make_groups, prepare_megatron
from aligner.trainer.megatron.layers import fuse_activations
from aligner.trainer.megatron.model import transformer_config


def compare(world: World, folder: Path, counts: list[int]) -> list[float]:
    """The largest differences, relative to the largest value: outputs, gradients of rows, probabilities and the two weights."""
    spec, mesh = read_spec(folder), Mesh((0,), name="policy")
    install()
    prepare_megatron()
    model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    groups = make_groups(world, mesh)
    config = transformer_config(spec, mesh, torch.float32, False, "none")
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    assert groups is not None
    sequential = SequentialMLP(spec.experts, config, linears, pg_collection=groups)
    fuse_activations(sequential, spec.activation)
    grouped = GroupedExperts(spec.experts, config, pg_collection=groups, activation=spec.activation)
    torch.manual_seed(1)
    with torch.no_grad():
        for slot, expert in enumerate(sequential.local_experts):
            for linear, stack in ((expert.linear_fc1, grouped.weight1), (expert.linear_fc2, grouped.weight2)):
                stack[slot] = linear.weight.copy_(torch.randn_like(linear.weight) / 8)
    attributes = ("tensor_model_parallel", "allreduce")
    own, theirs = grouped.weight1, sequential.local_experts[0].linear_fc1.weight
    assert [getattr(own, name) for name in attributes] == [getattr(theirs, name) for name in attributes]
    hidden, prob, weight = (
        torch.randn(sum(counts), spec.hidden),
        torch.rand(sum(counts)),
        torch.randn(sum(counts), spec.hidden),
    )

    def outcome(module: Any) -> list[torch.Tensor]:
        rows, p = hidden.clone().requires_grad_(), prob.clone().requires_grad_()
        out, bias = module(rows, torch.tensor(counts), p)
        assert bias is None
        (out * weight).sum().backward()
        return [out.detach(), *(torch.zeros(1) if x.grad is None else x.grad for x in (rows, p))]

    reference, found = outcome(sequential), outcome(grouped)
    for stack, name in ((grouped.weight1, "linear_fc1"), (grouped.weight2, "linear_fc2")):
        reference.append(torch.stack([getattr(one, name).weight.grad for one in sequential.local_experts]))
        found.append(stack.grad)
    pairs = [pair for pair in zip(reference, found, strict=True) if pair[0].numel()]
    return [float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)) for one, other in pairs]


def fake_forward(world: World, folder: Path) -> tuple[Any, ...]:
    """torch's kernel takes the arguments on a (fake) GPU in bfloat16."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        rows = torch.empty(32, 64, dtype=torch.bfloat16, device="cuda")
        weights = torch.empty(4, 96, 64, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        out = F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
        return tuple(out.shape), str(out.dtype), out.device.type
