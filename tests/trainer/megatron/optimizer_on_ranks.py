"""What ranks do in the optimizer's tests: a small policy, a batch of random tokens, and one promise at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.flat_range import clip
from aligner.trainer.not_finite import NotFinite, SkipCounter
from aligner.trainer.policy import Policy


def batch() -> Samples:
    tokens_BT = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(9).expand(6, 9) >= 2
    return Samples(tokens_BT, torch.full((6,), 2), torch.full((6,), 9), mask_BT, torch.arange(6), [{}] * 6)


def nothing(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return 0.0 * policy_logp_BT, {}


def imitate(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def broken(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return policy_logp_BT * float("nan"), {}


def policy(world: World, model: Path, name: str, optimizer: OptimizerConfig, dtype: str = "float32") -> Any:
    config = PolicyConfig(dtype=dtype, optimizer=optimizer)
    return Policy(name, world, Mesh(tuple(range(world.size))), read_spec(model), config)


def weights(policy: Any) -> dict[str, Tensor]:
    return {name: parameter.data.clone() for name, parameter in policy.engine.model.parameters.items()}


def check_decay(world: World, model: Path, distributed: bool) -> None:
    """With no gradient AdamW only shrinks what decays, by lr x weight_decay."""
    decaying = policy(world, model, "decay", OptimizerConfig(lr=0.1, weight_decay=0.5, distributed=distributed))
    before = weights(decaying)
    decaying.update(nothing, decaying.scatter(batch())).gather()
    for name, now in weights(decaying).items():
        expected = before[name] * (1.0 if before[name].dim() == 1 else 0.95)
        assert torch.allclose(now, expected, rtol=1e-6, atol=1e-8), name
    assert any(weight.dim() == 1 for weight in before.values())


def check_masters_start_from_the_file(world: World, model: Path) -> None:
    """From the folder's float32, not from what bf16 has left of it."""
    trained = policy(world, model, "bf16", OptimizerConfig(lr=1e-4), "bfloat16")
    stored, not_in_bf16 = load_file(model / "model.safetensors"), 0
    for part in trained.engine.optimizer_slices():
        for piece in (piece for piece in trained.weights.pieces() if piece.storage == part.storage):
            for box in clip(piece, part.start, part.stop):
                inside = tuple(slice(low, low + extent) for low, extent in zip(box.lo, box.size, strict=True))
                expected = stored[box.name][inside]
                offset = part.master.storage_offset() + box.offset
                master = torch.as_strided(part.master, box.size, box.stride, offset)
                assert torch.equal(master, expected), box
                not_in_bf16 += int((master != expected.bfloat16().float()).sum())
    assert not_in_bf16 > 1000, not_in_bf16


def check_masters_round_to_the_parameters(world: World, model: Path) -> None:
    """bf16 parameters are the rounded fp32 masters, which keep what bf16 cannot show: small steps add up."""
    trained = policy(world, model, "bf16", OptimizerConfig(lr=1e-4), "bfloat16")
    losses = [trained.update(imitate, trained.scatter(batch())).gather()["loss"] for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05, losses
    inner = trained.engine.optimizer.inner
    inner = getattr(inner, "chained_optimizers", [inner])[0]
    groups = zip(inner.model_float16_groups, inner.shard_fp32_from_float16_groups, strict=True)
    kept = 0
    for parameter, master in (pair for models, shards in groups for pair in zip(models, shards, strict=True)):
        if master is not None:
            span = inner._get_model_param_range_map(parameter)["param"]
            mine = parameter.data.view(-1)[span.start : span.end]
            assert torch.equal(master.to(torch.bfloat16).view(-1), mine)
            kept += int((master.view(-1) != mine.float()).sum())
    assert kept > 0, "masters hold no more than bf16"


def check_clipping(world: World, model: Path) -> None:
    """The reported norm is the one before it."""
    roles = [policy(world, model, f"clip {limit}", OptimizerConfig(lr=0.0, clip_grad=limit)) for limit in (1e-3, 0.0)]
    clipped, free = (role.update(imitate, role.scatter(batch())).gather()["grad_norm"] for role in roles)
    assert abs(clipped - free) < 1e-5 * free and free > 1e-2, (clipped, free)


def check_not_finite(world: World, model: Path) -> None:
    """A loss that is not finite stops, where it shall, before the weights change."""
    stopping = policy(world, model, "not finite", OptimizerConfig(lr=0.1, clip_grad=0.0))
    stopping.update(imitate, stopping.scatter(batch())).gather()
    stopping.skips = SkipCounter(NotFinite("stop"))
    before = weights(stopping)
    with pytest.raises(ValueError, match="the loss is nan at optimizer step 1"):
        stopping.update(broken, stopping.scatter(batch())).gather()
    assert all(torch.equal(before[name], now) for name, now in weights(stopping).items())
