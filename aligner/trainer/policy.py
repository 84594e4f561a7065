"""The policy and the reference: language models that give log-probabilities; the policy also learns and is resharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aligner.reshard.config import ReshardConfig
from aligner.spmd.ref import Ref
from aligner.trainer.model_role import ModelRole
from aligner.trainer.readout import LogProbs
from aligner.trainer.trainable_role import TrainableRole

if TYPE_CHECKING:
    from aligner.reshard.sync import WeightSync
    from aligner.rollout.role import Rollout


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

    def __init__(self, *args: Any, reshard: ReshardConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reshard = reshard or ReshardConfig()
        self.syncs: dict[str, WeightSync] = {}
        self._sent: dict[str, int] = {}
        if self.member:
            self.make_optimizer()  # it moves the parameters, whose places a sync remembers

    def reshard_to(self, rollout: Rollout) -> None:
        """Bring the rollout engine the weights as they are now; a proof of the sync is in its ledger row."""
        from aligner.reshard.sync import WeightSync

        rollout.drain_before_sync(self.mesh)
        with self.call("reshard_to", also=(rollout,)):
            if rollout.name not in self.syncs:
                self.syncs[rollout.name] = WeightSync(self, rollout, self.reshard)
            self.syncs[rollout.name].run()
        rollout.took_weights(self.version)
        self._sent[rollout.name] = self.version
        rollout.sender = self

    def sync(self, rollout: Rollout) -> None:
        """`reshard_to`, unless the engine has these weights already."""
        if self._sent.get(rollout.name) != self.version or self.world.residency.is_out(rollout.name, "weights"):
            self.reshard_to(rollout)

    def send_again(self, rollout: Rollout) -> None:
        """Bring an engine that gave up its weights the same ones; a role call of every rank.

        Raises:
            RuntimeError: this policy has other weights by now.
        """
        if self._sent.get(rollout.name) != self.version:
            raise RuntimeError(
                f"{rollout.name}.generate: the engine's weights were given up to make room for other roles, and the policy "
                "has been updated since they were sent. Call policy.reshard_to(rollout) before generate, or keep them with "
                f"residency.keep=[{rollout.name}.weights]."
            )
        self.reshard_to(rollout)
