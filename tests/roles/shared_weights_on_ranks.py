"""What ranks do in test_shared_weights.py: a rollout over the policy's own weights, beside one with a copy of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.objective.losses import negative_log_likelihood
from aligner.roles.build import _shared_weights
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import Sampling
from aligner.rollout.role import Rollout
from aligner.spmd.mesh import Mesh
from aligner.spmd.residency_config import ResidencyConfig
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.policy import Policy
from tests.rollout import tiny

DRAWN = Sampling(temperature=0.9, max_tokens=16, stop_token_ids=())
PROMPTS = [Prompt(tuple(tokens), "", {}, index) for index, tokens in enumerate(tiny.prompts(6))]


def check(world: World, folder: Path, dtype: str) -> None:
    """The same samples as with a copy, bit for bit, before and after updates; what is shared is never taken for current.

    Args:
        folder: of the model.
        dtype: that the policy computes in.
    """
    world.residency.config = ResidencyConfig(mode="offload")  # the policy's weights leave while others compute
    spec, ranks = read_spec(folder), tuple(range(world.size))
    mesh = Mesh(ranks, name="policy", replicas=world.size)
    config = PolicyConfig(engine="fsdp", dtype=dtype, optimizer=OptimizerConfig(lr=1e-2))
    policies = [
        Policy(name, world, mesh, spec, config, total_steps=9, max_response=16, syncs=WeightSyncs()) for name in "ab"
    ]
    policy, other = policies
    settings = replace(tiny.config("transformers"), max_num_seqs=4)
    copied = Rollout("copied", world, Mesh(ranks, name="copied"), spec, settings, DRAWN, 7)
    settings, shared = replace(settings, share_policy_weights=True), _shared_weights(policy)
    own = Rollout("own", world, Mesh(ranks, name="own"), spec, settings, DRAWN, 7, shared=shared)
    with pytest.raises(RuntimeError, match="has no weights yet"):
        own.generate(PROMPTS)
    answers: list[Samples] = []
    for _ in range(3):
        for rollout in (copied, own):
            policy.sync(rollout)
            assert rollout.loaded.current(policy)
        seed = len(answers)
        theirs, ours = (rollout.generate(PROMPTS, 2, seed=seed).gather() for rollout in (copied, own))
        for name in ("tokens_BT", "length_B", "rollout_logp_BT", "version_BT"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        answers.append(own.generate(PROMPTS, 2, seed=99).gather())
        policy.update(negative_log_likelihood, policy.scatter(ours))
        with pytest.raises(
            RuntimeError, match=r"own computes with the weights of a, which has been updated .* a\.resh"
        ):
            own.generate(PROMPTS)
        own.save_state()  # at a checkpoint before the sync; nothing is under way
    assert all(not torch.equal(answers[0].tokens_BT, later.tokens_BT) for later in answers[1:]), "it does not move"
    assert list(policy.syncs.by_rollout) == ["copied"], "a sync into what is shared"  # type: ignore[union-attr]
    memory = {policy.weights.local(name).data_ptr() for name in storages(policy)}  # type: ignore[attr-defined]
    assert {value.data_ptr() for value in own.engine.storages.values()} == memory  # type: ignore[attr-defined]
    assert own.engine.parts(world.residency.meter).keys() == {"cache"}
    with pytest.raises(ValueError, match=r"b.reshard_to\(own\): own computes with the policy's own weights; set"):
        other.reshard_to(own)
    policy.sync(copied)
    policy.sync(own)
    own.calls = copied.calls = 0  # the same seeds
    started = copied.start(PROMPTS), own.start(PROMPTS)
    assert torch.equal(copied.finish(started[0]).gather().tokens_BT, own.finish(started[1]).gather().tokens_BT)
    started = own.start(PROMPTS)
    policy.update(negative_log_likelihood, policy.scatter(answers[0]))
    with pytest.raises(RuntimeError, match="own computes with the weights of a, which has been updated"):
        own.finish(started)


def storages(policy: Policy) -> list[str]:
    """Names of what the policy's ranks hold."""
    weights: Any = policy.weights
    return [*weights.parameters, *weights.buffers]
