"""The reward model: a scalar head, read at each row's last token; frozen, or trained on preferences."""

from __future__ import annotations

from aligner.spmd.ref import Ref
from aligner.trainer.readout import Scores
from aligner.trainer.trainable_role import TrainableRole


class RewardModel(TrainableRole):
    """One score per row. A loss's first argument is score_B.

    Gradients and optimizer state are allocated in the first `update`, so a frozen reward model has none.
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
