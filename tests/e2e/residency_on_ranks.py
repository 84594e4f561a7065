"""What ranks do in the test of an engine's weights that leave memory: a policy, a reference and a rollout share all ranks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from aligner.config.schema import compose_config, to_config
from aligner.roles.build import build_roles
from aligner.run.prepare import prepare
from aligner.spmd.residency import Residency
from aligner.spmd.world import World


def imitate(policy_logp_BT: Tensor, *, mask_BT: Tensor) -> Any:
    return -policy_logp_BT.where(mask_BT, 0.0), {}


def check_weights(world: World, overrides: list[str], kept: bool) -> None:
    """Weights that were given up are sent again when the engine generates, unless the policy has moved on: then it is an error.

    Args:
        kept: whether the overrides say that they stay.
    """
    job = prepare(to_config(compose_config(overrides, "quickstart")), world.size)
    world.residency = Residency(world.device)
    roles = build_roles(job.config, job.roles, world, job.checked.meshes, job.checked.spec, job.checked.tokenizer)
    policy, rollout, reference = roles.policy, roles.rollout, roles.reference
    assert reference is not None and kept == (world.residency.config.keep == ("rollout.weights",))
    prompts = list(job.checked.data.training[:4])
    start = syncs(world)

    def tokens() -> Any:
        return rollout.generate(prompts, num_samples=2, seed=5).gather().tokens_BT.tolist()

    policy.reshard_to(rollout)
    first = tokens()
    samples = rollout.generate(prompts, num_samples=2, seed=5)
    reference.logprobs(samples)
    assert world.residency.is_out("rollout", "weights") is not kept
    assert tokens() == first, "the same weights, sent once more where they were given up"
    assert syncs(world) - start == (1 if kept else 2)
    policy.sync(rollout)
    assert syncs(world) - start == (1 if kept else 2)
    reference.logprobs(samples)
    policy.sync(rollout)
    assert syncs(world) - start == (1 if kept else 3) and not world.residency.is_out("rollout", "weights")
    policy.update(imitate, samples).gather()
    if kept:
        assert tokens() == first, "the weights that were sent before the update"
    else:
        with pytest.raises(RuntimeError, match=r"residency\.keep=\[rollout\.weights\]") as error:
            tokens()
        assert "policy.reshard_to(rollout)" in str(error.value)
    policy.reshard_to(rollout)
    assert tokens() != first
    for close in reversed(world._closers):
        close()
    world._closers.clear()


def syncs(world: World) -> int:
    return [call.what for call in world.journal.calls].count("policy.reshard_to")
