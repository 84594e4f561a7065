"""What ranks do in the parity tests of FSDP: one batch against transformers, row by row; export; a second update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.models.transformers_model import held_tensors
from aligner.models.verify_checkpoint import check_weights
from aligner.objective.losses import negative_log_likelihood
from aligner.reshard.message.storage import strided_view
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.policy import Policy, Reference
from tests.trainer.engines_on_ranks import LENGTH_B, LENGTHS, MASK_BT, PROMPT, TOKENS_BT, Memory

SETTINGS = PolicyConfig(engine="fsdp", micro_tokens=40, optimizer=OptimizerConfig(lr=0.0, clip_grad=0.0))


def check(
    world: World, model: Path, out: Path, replicas: int = 1, changes: Any = None, own_code: bool = False
) -> dict[str, float]:
    """Largest differences of log-probabilities, and of gradients relative to each tensor's largest; the export is exact."""
    spec = read_spec(model, own_code)
    check_weights(spec)
    mesh = Mesh(tuple(range(world.size)), name="policy", replicas=replicas)
    config = replace(SETTINGS, **(changes or {}))
    role = Policy(f"{model.name} {changes} {replicas}", world, mesh, spec, config, total_steps=20, max_response=20)
    samples = Samples(TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8), [{}] * 8, 0.0 * MASK_BT)
    placed = role.scatter(samples)
    logp_BT = role.logprobs(placed).gather()
    role.update(negative_log_likelihood, placed).gather()
    whole: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", trust_remote_code=own_code
    ).eval()
    worst = {"logprobs": 0.0, "gradients": 0.0}
    for row, length in enumerate(LENGTHS):
        tokens = TOKENS_BT[row, :length]
        logits = whole(tokens[None], use_cache=False).logits[0, :-1]
        row_logp = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0] * MASK_BT[row, 1:length]
        worst["logprobs"] = max(worst["logprobs"], (row_logp - logp_BT[row, 1:length]).abs().max().item())
        (-row_logp.sum() / MASK_BT.sum()).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in whole.named_parameters()
    }
    of_tensor = {
        piece.name: strided_view(gradients[held.storage].contiguous(), piece)
        for held in held_tensors(spec)
        if held.trained
        for piece in held.pieces
    }
    found = role.engine.optimizer.gradients()  # type: ignore[attr-defined]
    for piece in role.weights.pieces():
        if piece.name not in of_tensor:
            continue
        want = of_tensor[piece.name]
        box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
        if piece.storage not in found:  # the class does not train it
            assert not want.any(), piece
            continue
        off = (strided_view(found[piece.storage], piece) - want[box]).abs().max() / want.abs().max().clamp(min=1e-3)
        worst["gradients"] = max(worst["gradients"], off.item())
    check_state(world, role, Policy(f"{role.name}, resumed", world, mesh, spec, config, total_steps=20))
    role.save_checkpoint(out / "export", "float32")
    dist.barrier()
    left, right = (_tensors(folder) for folder in (model, out / "export"))
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert read_spec(out / "export", own_code) == replace(spec, path=str(out / "export"))
    return worst


def check_untrained(world: World, model: Path, out: Path) -> list[str]:
    """Names of the tensors that optimizer steps with weight decay leave as they are."""
    spec, mesh = read_spec(model), Mesh(tuple(range(world.size)), name="policy")
    config = replace(SETTINGS, optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.5))
    role, resumed = (Policy(f"{model.name} {name}", world, mesh, spec, config, total_steps=20) for name in "ab")
    samples = Samples(TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8), [{}] * 8, 0.0 * MASK_BT)
    for _ in range(2):
        role.update(negative_log_likelihood, role.scatter(samples)).gather()
    check_state(world, role, resumed)
    resumed.update(negative_log_likelihood, resumed.scatter(samples)).gather()
    resumed.save_checkpoint(out / "export", "float32")
    dist.barrier()
    left, right = (_tensors(folder) for folder in (model, out / "export"))
    return sorted(name for name in left if torch.equal(left[name], right[name]))


def check_frozen(world: World, model: Path) -> None:
    """A frozen bfloat16 model, whose weights are bfloat16, computes what one that learns computes from its float32 masters."""
    spec, mesh = read_spec(model), Mesh(tuple(range(world.size)), name="policy")
    config = replace(SETTINGS, dtype="bfloat16")
    frozen = Reference(f"{model.name} frozen", world, mesh, spec, config)
    learns = Policy(f"{model.name} learns", world, mesh, spec, config, total_steps=20, max_response=20)
    assert {piece.dtype for piece in frozen.weights.pieces()} == {"bfloat16"}
    assert {piece.dtype for piece in learns.weights.pieces()} == {"float32"}
    samples = Samples(TOKENS_BT, torch.full((8,), PROMPT), LENGTH_B, MASK_BT, torch.arange(8), [{}] * 8, 0.0 * MASK_BT)
    one, other = (role.logprobs(role.scatter(samples)).gather() for role in (frozen, learns))
    assert torch.equal(one, other), (one - other).abs().max()


def check_state(world: World, role: Policy, resumed: Policy) -> None:
    """A role that goes on from a saved state has the same weights and moments, buffers among them, to the last bit."""
    counters, *saved = role.save_state()
    resumed.load_state(counters, Memory(world, *saved))
    for one, other in zip(role.engine.optimizer_slices(), resumed.engine.optimizer_slices(), strict=True):
        assert one.storage == other.storage and torch.equal(one.master, other.master), one.storage
        for kind, moment in one.moments.items():
            assert torch.equal(moment, other.moments[kind]), (one.storage, kind)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
