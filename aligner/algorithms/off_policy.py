"""The proximal policy's log-probabilities, which decoupled PPO losses need beside those of the rollout engine."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from aligner.spmd.ref import Ref
from aligner.trainer.loss_mean import LossFunction

if TYPE_CHECKING:
    from aligner.trainer.policy import Policy


def proximal_logprobs(policy: Policy, loss: LossFunction, samples: Ref) -> dict[str, Ref]:
    """{"proximal_logp_BT": the policy's log-probabilities before this update}, or {} where the loss does not need them.

    They are computed only for a loss with an argument `proximal_logp_BT`, and only if the batch is split into several
    optimizer steps; with one step the loss uses its own log-probabilities, detached. Collective over the world.
    """
    one_step = policy.config.epochs * policy.config.minibatches == 1
    if one_step or "proximal_logp_BT" not in inspect.signature(loss).parameters:
        return {}
    return {"proximal_logp_BT": policy.logprobs(samples)}
