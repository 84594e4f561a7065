"""The critic: a trained model with a scalar head (PPO's value function)."""

from __future__ import annotations

from typing import Any

from aligner.spmd.ref import Ref
from aligner.trainer.readout import Values
from aligner.trainer.trainable_role import TrainableRole


class Critic(TrainableRole):
    """State values for every token. A loss's first argument is value_BT: V of the state before token t, as `values` returns."""

    section = "critic"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.member:
            self.make_optimizer()  # allocate now rather than at the first update

    def readout(self) -> Values:
        """The head's output at the preceding token."""
        return Values()

    def values(self, samples: Ref) -> Ref:
        """V of the state before each token: the head's output at the preceding token.

        Returns:
            Ref to [B, T] float32, 0 outside `samples.mask_BT`.
        """
        return self.read("values", samples)
