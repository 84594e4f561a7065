"""The reward model: a scalar head read at each row's last token; frozen, or trained on preferences."""

from __future__ import annotations

from aligner.spmd.ref import Ref
from aligner.trainer.readout import Scores
from aligner.trainer.trainable_role import TrainableRole


class RewardModel(TrainableRole):
    """One score a row. A loss's first argument is score_B.

    A reward model that is only asked for scores holds no gradients and no optimizer state: they are made in the first
    `update`, which every rank of the role enters together.
    """

    section = "reward_model"

    def readout(self) -> Scores:
        """The head's output at the last token."""
        return Scores()

    def scores(self, samples: Ref) -> Ref:
        """The score of each row: the head's output at its last token, as in transformers' `*ForSequenceClassification`.

        Returns:
            Ref to [B] float32.
        """
        return self.read("scores", samples)
