"""A model that leaves between any two calls and comes back trains as one that stays, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.trainer import offload
from aligner.trainer.config import OptimizerConfig, PolicyConfig, RewardModelConfig
from aligner.trainer.offload import storages
from aligner.trainer.policy import Policy
from aligner.trainer.reward_model import RewardModel
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World

offload.BUCKET_BYTES = 10_001  # storages lie across blocks, and begin at odd places
world = World(100)
everyone = tuple(range(world.size))
spec = read_spec(sys.argv[1])
tokens_BT = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
place = torch.arange(9).expand(6, 9)
samples = Samples(tokens_BT, torch.full((6,), 2), torch.full((6,), 9), place >= 2, torch.arange(6), [{}] * 6)

def imitate(policy_logp_BT, *, mask_BT):
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}

def to_one(score_B):
    return (score_B - 1).square(), {}

def everything(role):
    weights, gradients, state = (part._tensors() for part in role.engine.parts().values())
    return [*weights, *state], gradients

def size(tensors):
    return sum(storage.nbytes() for storage in storages(tensors))

def leave_and_return(role, parts, order):
    kept, scratch = everything(role)
    before, bytes_kept, bytes_scratch = [t.clone() for t in kept], size(kept), size(scratch)
    said = {name: part.bytes() for name, part in parts.items()}
    assert said["weights"] + said["optimizer"] == bytes_kept and said["gradients"] == bytes_scratch, said
    for name in order:
        parts[name].evict()
    assert size(kept) == size(scratch) == 0, "something is still there"
    assert {name: part.bytes() for name, part in parts.items()} == said
    for name in reversed(order):
        parts[name].bring()
    assert size(kept) == bytes_kept and size(scratch) == bytes_scratch
    assert all(torch.equal(a, b) for a, b in zip(before, kept))
    assert all(not buffer.any() for buffer in scratch)

def aliases(role):
    # Megatron's views: parameters in its flat buffer, gradients in theirs
    for chunk in role.engine.optimizer.chunks:
        for buffer in chunk.buffers:
            for parameter in buffer.params:
                assert parameter.main_grad.untyped_storage()._cdata == buffer.grad_data.untyped_storage()._cdata
                if buffer.param_data is not None:
                    assert parameter.data.untyped_storage()._cdata == buffer.param_data.untyped_storage()._cdata

ORDER = ["gradients", "optimizer", "weights"]
for dtype in ("float32", "bfloat16"):
    for distributed in (True, False):
        config = PolicyConfig(dtype=dtype, optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, distributed=distributed))
        staying, moving = (
            Policy(f"{name}{dtype}{distributed}", world, Mesh(everyone, tensor=int(sys.argv[2])), spec, config)
            for name in ("staying", "moving")
        )
        parts = moving.engine.parts()
        for step in range(4):
            leave_and_return(moving, parts, ORDER)  # before the first step there are no moments yet
            logp = [p.logprobs(p.scatter(samples)).gather() for p in (staying, moving)]
            assert torch.equal(*logp)
            for part in parts.values():
                part.changed()
            found = [p.update(imitate, p.scatter(samples)).gather() for p in (staying, moving)]
            assert found[0] == found[1], found
            aliases(moving)
        (one, _), (other, _) = everything(staying), everything(moving)
        assert len(one) == len(other) > 20 and all(torch.equal(a, b) for a, b in zip(one, other))
        inner = getattr(moving.engine.optimizer.inner, "chained_optimizers", [moving.engine.optimizer.inner])
        optimized = sum(len(group["params"]) for one in inner for group in one.optimizer.param_groups)
        state = parts["optimizer"]._tensors()
        assert len(state) == optimized * (3 if dtype == "bfloat16" else 2), "two moments, and masters under bf16"

# what has not changed is not copied again; what has, is
part = moving.engine.parts()["weights"]
copies, pairs = [], part._pairs
part._pairs = lambda: copies.append(1) or pairs()
for changes, counted in ((False, 2), (False, 3), (True, 5)):
    if changes:
        part.changed()
        part._tensors()[0].fill_(3.0)
    part.evict()
    part.bring()
    assert len(copies) == counted, copies
assert (part._tensors()[0] == 3.0).all()

# a role whose optimizer is made in its first update, which moves the parameters
model = RewardModel("scorer", world, Mesh(everyone), with_scalar_head(spec), RewardModelConfig(optimizer=OptimizerConfig(lr=1e-2)))
parts = model.engine.parts()
assert parts["gradients"].bytes() == parts["optimizer"].bytes() == 0
score = model.scores(model.scatter(samples)).gather()
leave_and_return(model, parts, ORDER)
assert torch.equal(score, model.scores(model.scatter(samples)).gather())
for part in parts.values():
    part.changed()
model.update(to_one, model.scatter(samples)).gather()
leave_and_return(model, parts, ORDER)
aliases(model)
assert parts["optimizer"].bytes() > 0 and parts["gradients"].bytes() > 0
print("trained alike\\n", end="", flush=True)
world.leave()
"""


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_training_goes_on_bit_for_bit(torchrun, tmp_path: Path, ranks: int, tensor: int) -> None:  # type: ignore[no-untyped-def]
    from aligner.data.column_addition import ModelShape, write_model

    write_model(tmp_path / "model", ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = torchrun(ranks, [str(tmp_path / "program.py"), str(tmp_path / "model"), str(tensor)], seconds=250)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.count("trained alike") == ranks
