"""The policy and the frozen reference: language models whose role call is `logprobs`; the policy is also trained and synced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from aligner.spmd.ref import Ref
from aligner.trainer.model_role import ModelRole
from aligner.trainer.readout import LogProbs
from aligner.trainer.trainable_role import TrainableRole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aligner.reshard.transfer.sync_stats import SyncStats
    from aligner.rollout.role import Rollout


class RolloutWeightSync(Protocol):
    """Syncs a policy's weights into rollout engines: `aligner.roles.weight_sync.WeightSyncs`."""

    def run(self, policy: Policy, rollout: Rollout) -> None:
        """Sync the current weights; a role call of every rank."""

    def latest(self) -> Sequence[SyncStats]:
        """Statistics of the last sync into each rollout, on this rank."""


class Reference(ModelRole):
    """A frozen language model: log-probabilities only."""

    def __init__(self, *args: Any, temperature: float = 1.0, **kwargs: Any) -> None:
        self.temperature = temperature
        super().__init__(*args, **kwargs)

    def readout(self) -> LogProbs:
        """Log-probabilities of logits divided by the sampling temperature."""
        return LogProbs(self.temperature)

    def logprobs(self, samples: Ref) -> Ref:
        """log p(token | preceding tokens) under this model, in nats, of logits divided by the sampling temperature.

        Returns:
            Ref to [B, T] float32, 0 outside `samples.mask_BT`.
        """
        return self.read("logprobs", samples)


class Policy(TrainableRole, Reference):
    """The trained language model. A loss's first argument is policy_logp_BT; it may also take entropy_BT by name."""

    section = "policy"
    samples_itself = True

    def __init__(self, *args: Any, syncs: RolloutWeightSync | None = None, **kwargs: Any) -> None:
        """Args:
        syncs: this policy's weight syncs; None: it is never synced into a rollout.
        """
        super().__init__(*args, **kwargs)
        self.syncs = syncs
        if self.member:
            self.make_optimizer()  # now, because it moves the parameters, whose addresses a weight sync caches

    def reshard_to(self, rollout: Rollout) -> None:
        """Sync the current weights into the rollout's engines, and verify them. Collective over the world.

        Running requests are completed first; with `stream.in_flight` they continue with the new weights.

        Raises:
            ValueError: the engines run another model.
            RuntimeError: verification failed; the message names tensor, region and ranks. The engines then have no valid weights.
        """
        assert self.syncs is not None, f"{self.name} was built without weight syncs"
        self.syncs.run(self, rollout)

    def sync(self, rollout: Rollout) -> None:
        """`reshard_to`, unless the engines already hold these weights."""
        if not rollout.loaded.current(self):
            self.reshard_to(rollout)
