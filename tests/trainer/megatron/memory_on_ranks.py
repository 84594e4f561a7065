"""What ranks do in the tests of activation memory: an update whose tensors are counted, beside the estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer import attention_mask
from aligner.trainer.activations import Microbatch
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.megatron.activations import activation_bytes
from aligner.trainer.policy import Policy
from tools.bench.live_tensors import peak_bytes


def likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def rows_of(lengths: tuple[int, ...], vocab: int, prefix: int) -> Samples:
    """All tokens but the first are trained; all rows begin with the same `prefix` tokens."""
    rows, width = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, vocab, (rows, width), generator=generator)
    tokens_BT[:, :prefix] = tokens_BT[0, :prefix]
    length_B, place_T = torch.tensor(lengths), torch.arange(width)
    mask_BT = (place_T >= max(1, prefix)) & (place_T < length_B[:, None])
    return Samples(tokens_BT, torch.ones(rows, dtype=torch.long), length_B, mask_BT, torch.arange(rows), [{}] * rows)


def peaks(
    world: World,
    folder: Path,
    lengths: tuple[int, ...],
    mesh: dict[str, int],
    settings: dict[str, Any],
    prefix: int = 0,
) -> dict[str, tuple[float, float]]:
    """Call -> (bytes predicted, bytes of live tensors at their peak) on this rank."""
    spec, parallel = read_spec(folder), mesh.get("tensor", 1) > 1
    placed = Mesh(tuple(range(world.size)), name="policy", **mesh)
    config = PolicyConfig(optimizer=OptimizerConfig(lr=0.0), **{"micro_tokens": sum(lengths), **settings})
    policy = Policy("policy", world, placed, spec, config, sequence_parallel=parallel)
    samples = rows_of(lengths, spec.vocab, prefix)
    short = replace(samples, tokens_BT=samples.tokens_BT[:, : prefix + 8], mask_BT=samples.mask_BT[:, : prefix + 8])
    short = replace(short, length_B=samples.length_B.clamp(max=prefix + 8))
    policy.update(likelihood, policy.scatter(short))  # makes what stays
    batch = policy.scatter(samples)
    tokens = min(config.micro_tokens, sum(lengths) - prefix * (len(lengths) - 1))
    predicting = samples.mask_BT.sum().item() / (sum(lengths) - prefix * (len(lengths) - 1))
    microbatch = Microbatch(tokens, max(lengths), len(set(lengths)) == 1 and not prefix, predicting)
    count = -(-sum(lengths) // tokens)
    said = activation_bytes(spec, placed, config, parallel, microbatch, microbatch, count, "cpu")
    attention_mask._mask.cache_clear()  # what is there already would not be counted
    update = peak_bytes(lambda: policy.update(likelihood, batch), world.device)
    attention_mask._mask.cache_clear()
    forward = peak_bytes(lambda: policy.logprobs(batch), world.device)
    return {"update": (said.update, update), "logprobs": (said.inference, forward)}


def peak_and_resident(world: World, folder: Path, tokens: int, recompute: str) -> tuple[float, float, float]:
    """Of an update on one row: bytes predicted, of live tensors, and by which the process grew."""
    from aligner.spmd.memory import resident

    spec, mesh = read_spec(folder), Mesh((0,), name="policy")
    config = PolicyConfig(micro_tokens=tokens, recompute=recompute, optimizer=OptimizerConfig(lr=0.0))
    policy = Policy("policy", world, mesh, spec, config)
    samples = rows_of((tokens,), spec.vocab, 0)
    policy.update(likelihood, policy.scatter(rows_of((64,), spec.vocab, 0)))
    batch, whole = policy.scatter(samples), Microbatch(tokens, tokens, alike=True)
    said = activation_bytes(spec, mesh, config, False, whole, whole, 1, "cpu")
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()[1]
    peak = peak_bytes(lambda: policy.update(likelihood, batch), world.device)
    return said.update, peak, resident()[0] - before
