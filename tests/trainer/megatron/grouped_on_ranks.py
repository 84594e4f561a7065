"""Grouped experts beside Megatron's own, on one rank."""

from __future__ import annotations

from dataclasses import replace
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
from aligner.trainer.policy import Policy
from tests.trainer import engines_on_ranks as updates


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


def hand_over(world: World, folder: Path, saving: str, heir: str, out: Path) -> float:
    """One update with `experts` of one kind; the largest difference of the next one's metrics and weights where the other kind
    goes on from its checkpoint, half of the experts on each rank."""
    _, config, _, loss, fields = updates.CASES["grpo"]
    spec, mesh = read_spec(folder), Mesh(tuple(range(world.size)), name="policy", expert=world.size)
    samples = updates.Samples(
        updates.TOKENS_BT, torch.full((8,), updates.PROMPT), updates.LENGTH_B, updates.MASK_BT, torch.arange(8) // 2,
        [{}] * 8, updates.ROLLOUT_BT,
    )  # fmt: skip

    def build(experts: str, name: str) -> Policy:
        return Policy(name, world, mesh, spec, replace(config, experts=experts), total_steps=20, max_response=20)

    def update(role: Policy) -> dict[str, float]:
        placed = role.scatter(samples, group_size=2)
        return role.update(loss, placed, **updates.fields(role, placed, **fields)).gather()  # type: ignore[no-any-return]

    first = build(saving, f"{world.size} {saving}")
    update(first)
    known, *saved = first.save_state()
    second = build(heir, f"{world.size} {saving} {heir}")
    second.load_state(known, updates.Memory(world, *saved))
    assert updates.exported_gap(first, second, out / "before") == 0.0
    rows = [update(role) for role in (first, second)]
    assert rows[0].keys() == rows[1].keys()
    gaps = [updates.gap(rows[1][name], rows[0][name]) for name in rows[0]]
    return max(*gaps, updates.exported_gap(first, second, out / "after"))


def fake_forward(world: World, folder: Path) -> tuple[Any, ...]:
    """torch's kernel takes the arguments on a (fake) GPU in bfloat16."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        rows = torch.empty(32, 64, dtype=torch.bfloat16, device="cuda")
        weights = torch.empty(4, 96, 64, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        out = F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
        return tuple(out.shape), str(out.dtype), out.device.type
