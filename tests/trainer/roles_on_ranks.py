"""What ranks do in the tests of roles as a job builds them: four rows of random tokens, and models with random weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from aligner.config.schema import compose_config, to_config
from aligner.data.samples import Samples
from aligner.data.tokenizer import load_tokenizer
from aligner.models.read_spec import read_spec
from aligner.objective.preference import simpo
from aligner.roles.build import build_roles
from aligner.spmd.placement import make_meshes
from aligner.spmd.world import World

LENGTH_B = torch.tensor([9, 6, 4, 8])
PLACE_BT = torch.arange(9).expand(4, 9)
TOKENS_BT = torch.randint(4, 60, (4, 9), generator=torch.Generator().manual_seed(0)) * (LENGTH_B[:, None] > PLACE_BT)
MASK_BT = (PLACE_BT >= 2) & (LENGTH_B[:, None] > PLACE_BT)
SAMPLES = Samples(TOKENS_BT, torch.full((4,), 2), LENGTH_B, MASK_BT, torch.arange(4), [{}] * 4)


def roles(world: World, model: Path, wanted: list[str], *overrides: str) -> Any:
    config = to_config(compose_config([f"model.path={model}", "train.steps=5", *overrides]))
    meshes = make_meshes(config.placement, world.size)
    return build_roles(config, wanted, world, meshes, read_spec(model), load_tokenizer(model))


def likelihood_beside_values(policy_logp_BT: Tensor, *, mask_BT: Tensor, value_BT: Tensor) -> Any:
    assert value_BT.shape == mask_BT.shape
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def likelihood(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def to_one(value_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return torch.where(mask_BT, (value_BT - 1).square(), 0.0), {}


def first_wins(score_B: Tensor, *, mask_BT: Tensor) -> Any:
    return torch.nn.functional.softplus(score_B[1::2] - score_B[::2]).repeat_interleave(2), {}


first_wins.rows_together = 2  # type: ignore[attr-defined]


def train_reward_model(world: World, model: Path, out: Path) -> Tensor:
    """Nothing but a reward model: its layout is the policy's, which is not built. Its scores, written to `out`."""
    alone = roles(world, model, ["reward_model"], "reward_model.optimizer.lr=1e-2", "placement.policy.pipeline=2")
    scorer = alone.reward_model
    assert alone.built == [scorer] and alone.trained == [] and alone.reference is None and scorer.mesh.pipeline == 2
    for name in ("policy", "critic", "rollout", "reward"):
        with pytest.raises(ValueError, match=f"add {name} to algorithm.roles"):
            getattr(alone, name)
    rows = scorer.scatter(SAMPLES, 2)
    assert scorer.scores(rows).gather().tolist() == [0.0] * 4, "a new head is zero"
    losses = [scorer.update(first_wins, rows).gather()["loss"] for _ in range(5)]
    assert abs(losses[0] - 0.6931472) < 1e-6 and losses[-1] < 0.5, losses
    assert alone.trained == [scorer]
    scorer.save_checkpoint(out)
    score_B: Tensor = scorer.scores(rows).gather()
    return score_B


def check_scores(world: World, scorer: Path, score_B: Tensor) -> None:
    """What was written scores as the role did, read by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    with torch.no_grad():
        for row, length in enumerate(LENGTH_B):
            score = model(TOKENS_BT[row : row + 1, :length]).logits.item()
            assert abs(score - score_B[row].item()) < 1e-5


OWN_RANKS = [
    "placement.policy.ranks=[0]", "placement.critic.ranks=[1]", "placement.reward_model.ranks=all",
    "placement.reward_model.tensor=2",
]  # fmt: skip


def check_reward_model_from_a_folder(world: World, model: Path, scorer: Path, score_B: Tensor) -> None:
    """It starts from what another job wrote, over other ranks; nobody trains it, so it has no optimizer."""
    several = roles(world, model, ["policy", "reward_model"], *OWN_RANKS, f"reward_model.path={scorer}")
    found_B = several.reward_model.scores(several.policy.scatter(SAMPLES, 2)).gather()
    assert (found_B - score_B).abs().max() < 1e-5
    assert several.trained == [several.policy]
    assert "optimizer" not in vars(several.reward_model)


def check_forward_microbatches(world: World, model: Path) -> None:
    """Rows of 9, 8, 6 and 4 tokens: two microbatches of 18, four of 9."""
    sizes = ["policy.forward_micro_tokens=18", "reference.micro_tokens=9"]
    several = roles(world, model, ["policy", "reference", "critic"], *OWN_RANKS, *sizes)
    rows, counts = several.policy.scatter(SAMPLES, 2), []

    def counted(run: Any, packed: Any) -> Any:
        counts.append(len(packed))
        return run(packed)

    for role in (several.policy, several.reference) if world.rank == 0 else ():
        role.engine.forward = functools.partial(counted, role.engine.forward)
    policy_BT, reference_BT = several.policy.logprobs(rows).gather(), several.reference.logprobs(rows).gather()
    assert (policy_BT - reference_BT).abs().max() < 1e-5
    assert counts == ([2, 4] if world.rank == 0 else []), counts


def check_critic_beside_the_policy(world: World, model: Path, scorer: Path) -> None:
    """Each on a rank of its own: the critic learns, and its values reach the policy's update."""
    several = roles(
        world, model, ["policy", "reference", "critic", "reward_model"], *OWN_RANKS, f"reward_model.path={scorer}",
        "critic.optimizer.lr=1e-2",
    )  # fmt: skip
    assert several.trained == [several.policy]
    assert several.critic.section == "critic" and several.critic.total_steps == 5
    rows, losses = several.policy.scatter(SAMPLES, 2), []
    for _ in range(5):
        value_BT = several.critic.values(rows)
        losses.append(several.critic.update(to_one, rows).gather()["loss"])
        several.policy.update(likelihood_beside_values, rows, value_BT=value_BT)
    assert losses[0] == 1.0 and losses[-1] < 0.5, losses
    assert not (several.critic.values(rows).gather() * ~MASK_BT).any()
    assert several.trained == [several.policy, several.critic]
    assert "optimizer" not in vars(several.reward_model)


def still_policy(world: World, model: Path) -> Any:
    return roles(world, model, ["policy"], "policy.optimizer.lr=0", "placement.policy.ranks=all").policy


def check_pair_of_which_a_row_trains_nothing(world: World, model: Path) -> None:
    """As if the batch were the first pair alone, and twice that pair."""
    policy = still_policy(world, model)
    hollow = dataclasses.replace(SAMPLES, mask_BT=MASK_BT & (torch.arange(4) != 3)[:, None])
    logp_BT = policy.logprobs(policy.scatter(SAMPLES, 2)).gather()
    loss_B, metrics = simpo(logp_BT[:2], mask_BT=MASK_BT[:2])
    row = policy.update(simpo, policy.scatter(hollow, 2)).gather()
    assert abs(row["loss"] - loss_B.mean().item()) < 1e-6 and row["tokens"] == 7 + 4, row
    for name, value_B in metrics.items():
        assert abs(row[name] - value_B.mean().item()) < 1e-6, (name, row)


def check_pair_that_is_left_out(world: World, model: Path) -> None:
    policy = still_policy(world, model)
    rows = policy.scatter(SAMPLES, 2)
    loss_B, _ = simpo(policy.logprobs(rows).gather()[:2], mask_BT=MASK_BT[:2])
    preference_B = policy.scatter_like(rows, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    row = policy.update(simpo, rows, preference_B=preference_B).gather()
    assert abs(row["loss"] - loss_B.mean().item()) < 1e-6 and row["tokens"] == 7 + 4, row


def check_staleness(world: World, model: Path) -> None:
    """Two minibatches of 11 and 8 tokens, of rows 0, 1, 2 and 3 updates old: the mean is over the tokens."""
    policy = still_policy(world, model)
    for _ in range(3):  # so that no row is older than the policy
        policy.update(likelihood, policy.scatter(SAMPLES)).gather()
    policy.config = dataclasses.replace(policy.config, minibatches=2)
    version_BT = (policy.version - torch.arange(4))[:, None].expand(4, 9).int().contiguous()
    samples = dataclasses.replace(SAMPLES, version_BT=version_BT)
    row = policy.update(likelihood, policy.scatter(samples, 1, 2)).gather()
    assert abs(row["staleness"] - (0 * 7 + 1 * 4 + 2 * 2 + 3 * 6) / 19) < 1e-9 and row["staleness_max"] == 3, row
