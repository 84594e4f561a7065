"""What a loss that corrects for another sampler asks of a loop."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from aligner.spmd.ref import Ref
from aligner.trainer.loss_mean import LossFunction

if TYPE_CHECKING:
    from aligner.trainer.policy import Policy


def proximal(policy: Policy, loss: LossFunction, samples: Ref) -> dict[str, Ref]:
    """The policy's log-probabilities before its update, for a loss that names `proximal_logp_BT`.

    Nothing for other losses, and none where a batch is one step: the loss then takes those of the step itself.
    """
    one_step = policy.config.epochs * policy.config.minibatches == 1
    if one_step or "proximal_logp_BT" not in inspect.signature(loss).parameters:
        return {}
    return {"proximal_logp_BT": policy.logprobs(samples)}
