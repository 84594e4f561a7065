"""The optimizer's promises on real ranks: decay groups, fp32 masters under bf16, clipping, and what is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
from safetensors.torch import load_file
from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.policy import Policy
from aligner.trainer.skips import NotFinite, Skips
from aligner.trainer.flat_range import clip
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World

world = World(100)
everyone = tuple(range(world.size))
spec = read_spec(sys.argv[1])
tokens_BT = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
place = torch.arange(9).expand(6, 9)
samples = Samples(tokens_BT, torch.full((6,), 2), torch.full((6,), 9), place >= 2, torch.arange(6), [{}] * 6)

def nothing(policy_logp_BT, *, mask_BT):
    return 0.0 * policy_logp_BT, {}

def imitate(policy_logp_BT, *, mask_BT):
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}

def weights(policy):
    return {name: p.data.clone() for name, p in policy.engine.model.parameters.items()}

# weight decay: with no gradient AdamW only shrinks what decays, by lr x weight_decay
for distributed in (True, False):
    config = PolicyConfig(optimizer=OptimizerConfig(lr=0.1, weight_decay=0.5, distributed=distributed))
    policy = Policy(f"decay{distributed}", world, Mesh(everyone), spec, config)
    before = weights(policy)
    policy.update(nothing, policy.scatter(samples)).gather()
    for name, now in weights(policy).items():
        expected = before[name] * (1.0 if before[name].dim() == 1 else 0.95)
        assert torch.allclose(now, expected, rtol=1e-6, atol=1e-8), name
    assert any(w.dim() == 1 for w in before.values())

# bf16 parameters are the rounded fp32 masters, which keep what bf16 cannot show
config = PolicyConfig(dtype="bfloat16", optimizer=OptimizerConfig(lr=1e-4))
policy = Policy("bf16", world, Mesh(everyone), spec, config)
# they start from the folder's float32, not from what bf16 has left of it
begun, given = 0, load_file(sys.argv[1] + "/model.safetensors")
for part in policy.engine.optimizer_slices():
    for piece in (p for p in policy.weights.pieces() if p.storage == part.storage):
        for box in clip(piece, part.start, part.stop):
            theirs = given[box.name][tuple(slice(lo, lo + n) for lo, n in zip(box.lo, box.size))]
            ours = torch.as_strided(part.master, box.size, box.stride, part.master.storage_offset() + box.offset)
            assert torch.equal(ours, theirs), box
            begun += int((ours != theirs.bfloat16().float()).sum())
assert begun > 1000, begun
losses = [policy.update(imitate, policy.scatter(samples)).gather()["loss"] for _ in range(30)]
assert losses[-1] < losses[0] - 0.05, losses
inner = policy.engine.optimizer.inner
inner = getattr(inner, "chained_optimizers", [inner])[0]
groups = zip(inner.model_float16_groups, inner.shard_fp32_from_float16_groups)
masters = [pair for models, shards in groups for pair in zip(models, shards)]
kept = 0
for model_param, master in masters:
    if master is None:
        continue
    span = inner._get_model_param_range_map(model_param)["param"]
    mine = model_param.data.view(-1)[span.start:span.end]
    assert torch.equal(master.to(torch.bfloat16).view(-1), mine)
    kept += int((master.view(-1) != mine.float()).sum())
assert kept > 0, "masters hold no more than bf16"

# clipping: the reported norm is the one before it
config = PolicyConfig(optimizer=OptimizerConfig(lr=0.0, clip_grad=1e-3))
clipped = Policy("clip", world, Mesh(everyone), spec, config)
config = PolicyConfig(optimizer=OptimizerConfig(lr=0.0, clip_grad=0.0))
free = Policy("free", world, Mesh(everyone), spec, config)
norms = [p.update(imitate, p.scatter(samples)).gather()["grad_norm"] for p in (clipped, free)]
assert abs(norms[0] - norms[1]) < 1e-5 * norms[1] and norms[1] > 1e-2, norms

# a loss that is not finite stops, where it shall, before the weights change
free.skips = Skips(NotFinite("stop"))
def broken(policy_logp_BT, *, mask_BT):
    return policy_logp_BT * float("nan"), {}
before = weights(free)
try:
    free.update(broken, free.scatter(samples)).gather()
except ValueError as error:
    assert "the loss is nan at optimizer step 1" in str(error), error
else:
    raise AssertionError("a NaN loss went through")
assert all(torch.equal(before[name], now) for name, now in weights(free).items())
print("promises kept\\n", end="", flush=True)
world.leave()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_promises(torchrun, tmp_path: Path, ranks: int) -> None:  # type: ignore[no-untyped-def]
    from aligner.data.column_addition import ModelShape, write_model

    write_model(tmp_path / "model", ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    (tmp_path / "promises.py").write_text(PROGRAM)
    done = torchrun(ranks, [str(tmp_path / "promises.py"), str(tmp_path / "model")], seconds=150)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.count("promises kept") == ranks
