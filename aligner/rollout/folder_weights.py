"""The weights of an engine that no policy has sent any: its model's folder, read by each rank as far as its engine holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner.models.checkpoint import read_weights
from aligner.models.spec import ModelSpec
from aligner.rollout.quantization import SETTING, quantized_tensors

if TYPE_CHECKING:
    from aligner.rollout.role import Rollout


class FolderWeights:
    """A `WeightSource`: the frozen weights of a folder, for a judge or any other engine that is not a policy's."""

    version = 0

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.name = spec, spec.path

    def reshard_to(self, rollout: Rollout) -> None:
        """Read the folder into the rollout's engines. A role call of every rank.

        Raises:
            ValueError: a missing or misshapen tensor, or a broken file; the message names it.
        """
        with rollout.call("load_folder"), rollout.loaded.loading(self):
            if rollout.member:
                quantized = quantized_tensors(self.spec, rollout.config)
                read_weights(self.spec, rollout.weights, quantized, SETTING)
        rollout.took_weights()
