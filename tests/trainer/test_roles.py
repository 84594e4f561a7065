"""Roles as a job builds them: a policy, a critic and a reward model on ranks of their own; a reward model alone."""

from __future__ import annotations

from pathlib import Path

PROGRAM = """
import dataclasses, functools, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from aligner.config.schema import compose_config, to_config
from aligner.data.samples import Samples
from aligner.data.tokenizer import load_tokenizer
from aligner.models.read_spec import read_spec
from aligner.objective.preference import simpo
from aligner.roles.build import build_roles
from aligner.spmd.placement import make_meshes
from aligner.spmd.world import World

folder = Path(sys.argv[1])
world = World(100)
length_B = torch.tensor([9, 6, 4, 8])
place_BT = torch.arange(9).expand(4, 9)
tokens_BT = torch.randint(4, 60, (4, 9), generator=torch.Generator().manual_seed(0)) * (place_BT < length_B[:, None])
mask_BT = (place_BT >= 2) & (place_BT < length_B[:, None])
samples = Samples(tokens_BT, torch.full((4,), 2), length_B, mask_BT, torch.arange(4), [{}] * 4)

def roles(wanted, *overrides):
    config = to_config(compose_config([f"model.path={folder}/model", "train.steps=5", *overrides]))
    meshes = make_meshes(config.placement, world.size)
    return build_roles(config, wanted, world, meshes, read_spec(folder / "model"), load_tokenizer(folder / "model"))

def likelihood(policy_logp_BT, *, mask_BT, value_BT):
    assert value_BT.shape == mask_BT.shape
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}

def likelihood_alone(policy_logp_BT, *, mask_BT):
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}

def to_one(value_BT, *, mask_BT):
    return torch.where(mask_BT, (value_BT - 1).square(), 0.0), {}

def first_wins(score_B, *, mask_BT):
    return torch.nn.functional.softplus(score_B[1::2] - score_B[::2]).repeat_interleave(2), {}
first_wins.rows_together = 2

# nothing but a reward model; its layout is the policy's, which is not built
alone = roles(["reward_model"], "reward_model.optimizer.lr=1e-2", "placement.policy.pipeline=2")
model = alone.reward_model
assert alone.built == [model] and alone.trained == [] and alone.reference is None and model.mesh.pipeline == 2
for name in ("policy", "critic", "rollout", "reward"):
    try:
        getattr(alone, name)
    except ValueError as error:
        assert f"add {name} to algorithm.roles" in str(error)
    else:
        raise AssertionError(f"{name} is there")
rows = model.scatter(samples, 2)
assert model.scores(rows).gather().tolist() == [0.0] * 4, "a new head is zero"
losses = [model.update(first_wins, rows).gather()["loss"] for _ in range(5)]
assert abs(losses[0] - 0.6931472) < 1e-6 and losses[-1] < 0.5, losses
assert alone.trained == [model]
model.save_checkpoint(folder / "scorer")
score_B = model.scores(rows).gather()
with torch.no_grad():
    for row, n in enumerate(length_B):
        back = AutoModelForSequenceClassification.from_pretrained(folder / "scorer")
        assert abs(back(tokens_BT[row : row + 1, :n]).logits.item() - score_B[row].item()) < 1e-5

# each on ranks of its own; the reward model starts from the folder written above
split = ["placement.policy.ranks=[0]", "placement.critic.ranks=[1]", "placement.reward_model.ranks=all"]
split += ["policy.forward_micro_tokens=18", "reference.micro_tokens=9"]
split += ["placement.reward_model.tensor=2", f"reward_model.path={folder}/scorer", "critic.optimizer.lr=1e-2"]
several = roles(["policy", "reference", "critic", "reward_model"], *split)
assert several.trained == [several.policy]
rows = several.policy.scatter(samples, 2)
assert (several.reward_model.scores(rows).gather() - score_B).abs().max() < 1e-5
# rows of 9, 8, 6 and 4 tokens: two microbatches of 18, four of 9
counts = []
def counted(run, packed):
    counts.append(len(packed))
    return run(packed)
for role in (several.policy, several.reference) if world.rank == 0 else ():
    role.engine.forward = functools.partial(counted, role.engine.forward)
ours_BT, theirs_BT = several.policy.logprobs(rows).gather(), several.reference.logprobs(rows).gather()
assert (ours_BT - theirs_BT).abs().max() < 1e-5 and counts == ([2, 4] if world.rank == 0 else []), counts
assert several.critic.section == "critic" and several.critic.total_steps == 5
losses = []
for _ in range(5):
    value_BT = several.critic.values(rows)
    losses.append(several.critic.update(to_one, rows).gather()["loss"])
    several.policy.update(likelihood, rows, value_BT=value_BT)
assert losses[0] == 1.0 and losses[-1] < 0.5, losses
assert not (several.critic.values(rows).gather() * ~mask_BT).any()
assert several.trained == [several.policy, several.critic]
assert "optimizer" not in vars(several.reward_model)

# the second pair has a row in which nothing is trained: as if the batch were the first alone, and twice that pair
policy = roles(["policy"], "policy.optimizer.lr=0", "placement.policy.ranks=all").policy
hollow = dataclasses.replace(samples, mask_BT=mask_BT & (torch.arange(4) != 3)[:, None])
logp_BT = policy.logprobs(policy.scatter(samples, 2)).gather()
of_first, metrics = simpo(logp_BT[:2], mask_BT=mask_BT[:2])
row = policy.update(simpo, policy.scatter(hollow, 2)).gather()
assert abs(row["loss"] - of_first.mean().item()) < 1e-6 and row["tokens"] == 7 + 4, row
for name, value_B in metrics.items():
    assert abs(row[name] - value_B.mean().item()) < 1e-6, (name, row)
left_out = torch.tensor([1.0, -1.0, 0.0, 0.0])
rows = policy.scatter(samples, 2)
row = policy.update(simpo, rows, preference_B=policy.scatter_like(rows, left_out)).gather()
assert abs(row["loss"] - of_first.mean().item()) < 1e-6 and row["tokens"] == 7 + 4, row

# two minibatches of 11 and 8 tokens, of rows 0, 1, 2 and 3 updates old: the mean is over the tokens
policy.config = dataclasses.replace(policy.config, minibatches=2)
version_BT = (policy.version - torch.arange(4))[:, None].expand(4, 9).int().contiguous()
row = policy.update(likelihood_alone, policy.scatter(dataclasses.replace(samples, version_BT=version_BT), 1, 2)).gather()
assert abs(row["staleness"] - (0 * 7 + 1 * 4 + 2 * 2 + 3 * 6) / 19) < 1e-9 and row["staleness_max"] == 3, row
print("roles stand\\n", end="", flush=True)
world.leave()
"""


def test_roles_of_a_job(torchrun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from aligner.data.column_addition import ModelShape, write_model

    write_model(tmp_path / "model", ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    (tmp_path / "roles.py").write_text(PROGRAM)
    done = torchrun(2, [str(tmp_path / "roles.py"), str(tmp_path)], seconds=150)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.count("roles stand") == 2
