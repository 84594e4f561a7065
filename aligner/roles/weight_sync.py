"""A policy's weights into the engines of a rollout: wires the two ends of a weight sync, and runs it as a role call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner.reshard.config import ReshardConfig
from aligner.reshard.quantized_weights import QuantizedWeights
from aligner.reshard.sync import WeightSync
from aligner.reshard.weights import ShardedWeights
from aligner.rollout.quantization import SETTING, quantized_tensors

if TYPE_CHECKING:
    from aligner.reshard.transfer.sync_stats import SyncStats
    from aligner.rollout.role import Rollout
    from aligner.trainer.policy import Policy


class WeightSyncs:
    """The weight syncs of one policy: one for each rollout that it is brought to, planned at the first run.

    Several policies may take turns with one rollout; which of them its engines hold is in `rollout.loaded`.
    """

    def __init__(self, config: ReshardConfig | None = None) -> None:
        self.config = config or ReshardConfig()
        self.by_rollout: dict[str, WeightSync] = {}
        """By the rollout's name."""

    def run(self, policy: Policy, rollout: Rollout) -> None:
        """Bring the policy's weights, as they are now, into the rollout's engines. Collective over the world; see
        `Policy.reshard_to`."""
        rollout.drain_before_sync(policy.mesh)
        with policy.call("reshard_to", also=(rollout,)):
            if rollout.shared is not None:
                rollout.use_shared(policy)
            else:
                self._copy(policy, rollout)
        rollout.took_weights()

    def _copy(self, policy: Policy, rollout: Rollout) -> None:
        if rollout.name not in self.by_rollout:
            source: ShardedWeights = policy.weights
            if quantized := quantized_tensors(policy.spec, rollout.config):
                source = QuantizedWeights(source, quantized, SETTING)
            self.by_rollout[rollout.name] = WeightSync(policy.world, source, rollout.weights, self.config)
        with rollout.loaded.loading(policy):
            self.by_rollout[rollout.name].run()

    def latest(self) -> list[SyncStats]:
        """What the last sync into each rollout moved on this rank."""
        return [sync.stats[-1] for sync in self.by_rollout.values() if sync.stats]
