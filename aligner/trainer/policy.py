"""The policy and the reference: language models that give log-probabilities; the policy also learns and is resharded."""

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
    """What brings a policy's weights into rollout engines: `aligner.roles.weight_sync.WeightSyncs`."""

    def run(self, policy: Policy, rollout: Rollout) -> None:
        """Bring them in as they are now; a role call of every rank."""

    def latest(self) -> Sequence[SyncStats]:
        """What the last sync into each rollout moved on this rank."""


class Reference(ModelRole):
    """A frozen language model: log-probabilities only."""

    def __init__(self, *args: Any, temperature: float = 1.0, **kwargs: Any) -> None:
        self.temperature = temperature
        super().__init__(*args, **kwargs)

    def readout(self) -> LogProbs:
        """After the sampling temperature."""
        return LogProbs(self.temperature)

    def logprobs(self, samples: Ref) -> Ref:
        """log p(token | tokens before it) under this model, after the sampling temperature.

        Returns:
            Ref to [B, T] float32, 0 outside `samples.mask_BT`.
        """
        return self.read("logprobs", samples)


class Policy(TrainableRole, Reference):
    """The trained language model. A loss's first argument is policy_logp_BT; it may also name entropy_BT."""

    section = "policy"
    samples_itself = True

    def __init__(self, *args: Any, syncs: RolloutWeightSync | None = None, **kwargs: Any) -> None:
        """Args:
        syncs: this policy's weight syncs; None: it is never synced into a rollout.
        """
        super().__init__(*args, **kwargs)
        self.syncs = syncs
        if self.member:
            self.make_optimizer()  # it moves the parameters, whose places a sync remembers

    def reshard_to(self, rollout: Rollout) -> None:
        """Sync the weights as they are now into the rollout's engines, and prove it. Collective over the world.

        Requests in flight are completed first, or with `stream.in_flight` meet the new weights.

        Raises:
            ValueError: the engines are of another model.
            RuntimeError: a proof failed, naming tensor, region and ranks; the engines have no valid weights then.
        """
        assert self.syncs is not None, f"{self.name} was built without weight syncs"
        self.syncs.run(self, rollout)

    def sync(self, rollout: Rollout) -> None:
        """`reshard_to`, unless the engines hold these weights already."""
        if not rollout.loaded.current(self):
            self.reshard_to(rollout)
