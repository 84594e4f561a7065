"""What ranks do in the tests of parts that leave and come back: a role that moves between any two calls beside one that stays.

Blocks of the copies on the host are small and of an odd size: storages lie across them, and begin at odd places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer import offload
from aligner.trainer.config import OptimizerConfig, PolicyConfig, RewardModelConfig
from aligner.trainer.offload import storages
from aligner.trainer.policy import Policy
from aligner.trainer.reward_model import RewardModel

PARTS = ("gradients", "optimizer", "weights")
"""In the order in which they leave."""
small_blocks = patch.object(offload, "BUCKET_BYTES", 10_001)


def batch() -> Samples:
    tokens_BT = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(9).expand(6, 9) >= 2
    return Samples(tokens_BT, torch.full((6,), 2), torch.full((6,), 9), mask_BT, torch.arange(6), [{}] * 6)


def imitate(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def to_one(score_B: Tensor) -> Any:
    return (score_B - 1).square(), {}


def kept_and_scratch(role: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and optimizer state, which are the same when they are back; gradients, which are zero."""
    weights, gradients, state = (part._tensors() for part in role.engine.parts().values())
    return [*weights, *state], gradients


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(storage.nbytes() for storage in storages(tensors))


def leave_and_return(role: Any, parts: Mapping[str, Any]) -> None:
    kept, scratch = kept_and_scratch(role)
    before, kept_bytes, scratch_bytes = [tensor.clone() for tensor in kept], nbytes(kept), nbytes(scratch)
    sizes = {name: part.bytes() for name, part in parts.items()}
    assert sizes["weights"] + sizes["optimizer"] == kept_bytes and sizes["gradients"] == scratch_bytes, sizes
    for name in PARTS:
        parts[name].evict()
    assert nbytes(kept) == nbytes(scratch) == 0, "something is still there"
    assert {name: part.bytes() for name, part in parts.items()} == sizes
    for name in reversed(PARTS):
        parts[name].bring()
    assert nbytes(kept) == kept_bytes and nbytes(scratch) == scratch_bytes
    assert all(torch.equal(one, other) for one, other in zip(before, kept, strict=True))
    assert all(not buffer.any() for buffer in scratch)


def check_aliases(role: Any) -> None:
    """Megatron's views: parameters in its flat buffer, gradients in theirs."""
    for chunk in role.engine.optimizer.chunks:
        for buffer in chunk.buffers:
            for parameter in buffer.params:
                assert parameter.main_grad.untyped_storage()._cdata == buffer.grad_data.untyped_storage()._cdata
                if buffer.param_data is not None:
                    assert parameter.data.untyped_storage()._cdata == buffer.param_data.untyped_storage()._cdata


def policy(world: World, model: Path, tensor: int, name: str, dtype: str, distributed: bool) -> Any:
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.1, distributed=distributed)
    mesh = Mesh(tuple(range(world.size)), tensor=tensor)
    return Policy(name, world, mesh, read_spec(model), PolicyConfig(dtype=dtype, optimizer=optimizer))


@small_blocks
def check_training(world: World, model: Path, tensor: int, dtype: str, distributed: bool) -> None:
    """Four steps, before each of which everything leaves and comes back (before the first there are no moments yet)."""
    staying, moving = (policy(world, model, tensor, name, dtype, distributed) for name in ("staying", "moving"))
    samples, parts = batch(), moving.engine.parts()
    for _ in range(4):
        leave_and_return(moving, parts)
        assert torch.equal(*(role.logprobs(role.scatter(samples)).gather() for role in (staying, moving)))
        for part in parts.values():
            part.changed()
        rows = [role.update(imitate, role.scatter(samples)).gather() for role in (staying, moving)]
        assert rows[0] == rows[1], rows
        check_aliases(moving)
    (one, _), (other, _) = kept_and_scratch(staying), kept_and_scratch(moving)
    assert len(one) == len(other) > 20 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    inner = getattr(moving.engine.optimizer.inner, "chained_optimizers", [moving.engine.optimizer.inner])
    optimized = sum(len(group["params"]) for optimizer in inner for group in optimizer.optimizer.param_groups)
    state = parts["optimizer"]._tensors()
    assert len(state) == optimized * (3 if dtype == "bfloat16" else 2), "two moments, and masters under bf16"


@small_blocks
def check_copies(world: World, model: Path, tensor: int) -> None:
    """What has not changed is not copied again; what has, is."""
    role = policy(world, model, tensor, "copied", "bfloat16", False)
    role.update(imitate, role.scatter(batch())).gather()
    part = role.engine.parts()["weights"]
    copies, slices = [], part._matching_slices

    def counted() -> Any:
        copies.append(1)
        return slices()

    with patch.object(part, "_matching_slices", counted):
        for changes, expected in ((False, 2), (False, 3), (True, 5)):
            if changes:
                part.changed()
                part._tensors()[0].fill_(3.0)
            part.evict()
            part.bring()
            assert len(copies) == expected, copies
    assert (part._tensors()[0] == 3.0).all()


@small_blocks
def check_late_optimizer(world: World, model: Path) -> None:
    """A role whose optimizer is made in its first update, which moves the parameters."""
    config = RewardModelConfig(optimizer=OptimizerConfig(lr=1e-2))
    mesh, spec = Mesh(tuple(range(world.size))), with_scalar_head(read_spec(model))
    scorer: Any = RewardModel("scorer", world, mesh, spec, config)
    samples, parts = batch(), scorer.engine.parts()
    assert parts["gradients"].bytes() == parts["optimizer"].bytes() == 0
    score_B = scorer.scores(scorer.scatter(samples)).gather()
    leave_and_return(scorer, parts)
    assert torch.equal(score_B, scorer.scores(scorer.scatter(samples)).gather())
    for part in parts.values():
        part.changed()
    scorer.update(to_one, scorer.scatter(samples)).gather()
    leave_and_return(scorer, parts)
    check_aliases(scorer)
    assert parts["optimizer"].bytes() > 0 and parts["gradients"].bytes() > 0
