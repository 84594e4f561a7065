"""The weights of an engine that no policy sends any: its model's folder, read by each rank as far as its engine holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner.models.checkpoint import read_weights
from aligner.models.family import logical_tensors
from aligner.models.spec import ModelSpec

if TYPE_CHECKING:
    from aligner.rollout.role import Rollout


class FolderWeights:
    """A frozen model's weights, for a judge or any other engine that is not a policy's."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def send_again(self, rollout: Rollout) -> None:
        """Read the folder into the engine. A role call of every rank.

        Raises:
            ValueError: a missing or misshapen tensor, or a broken file; the message names it.
        """
        with rollout.call("load_folder"):
            if rollout.member:
                pieces = rollout.weights.pieces(logical_tensors(self.spec))
                try:
                    read_weights(self.spec, pieces, rollout.weights)
                except BaseException:
                    rollout.weights.discard()
                    raise
        rollout.took_weights(0)
