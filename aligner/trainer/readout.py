"""What a role reads out of its model's head for a microbatch: log-probabilities, values or scores, by the names that losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from aligner.trainer.packing import Packed


class HeadOutput(Protocol):
    """What the model's head gave for the T tokens of a packed microbatch, however the training engine shards it."""

    def logprobs_and_entropy(self, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy of its distribution, of logits divided by `temperature`.

        Args:
            target_T: int64 token ids.

        Returns:
            (logp_T, entropy_T) in nats, [T] float32, equal on tensor-parallel ranks; differentiable.
        """

    def scalar(self) -> Tensor:
        """[T] float32: the output of a scalar head; differentiable."""


class Readout(Protocol):
    """From the head's output to what a role returns, and what its losses are given."""

    dims: Any
    """Dimensions of what it makes: 2 for [B, T], 1 for [B]."""

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """Float32 tensors by name, 0 at tokens that another context rank holds. The first is the role's result and a loss's
        first argument; a loss may ask for the others by name."""


@dataclass(frozen=True)
class LogProbs:
    """log p(token | tokens before it) and the entropy of that distribution, at the predicted token's place."""

    temperature: float
    """Divides the logits."""
    dims = 2

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """policy_logp_BT and entropy_BT, nats."""
        logp_T, entropy_T = head.logprobs_and_entropy(packed.targets_T, self.temperature)
        return {"policy_logp_BT": packed.to_rows(logp_T), "entropy_BT": packed.to_rows(entropy_T)}


class Values:
    """The value of the state before each token: the head's output at the token before it."""

    dims = 2

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """value_BT."""
        return {"value_BT": packed.to_rows(head.scalar())}


class Scores:
    """A row's score: the head's output at its last token, where transformers reads it too."""

    dims = 1

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """score_B."""
        return {"score_B": packed.at_ends(head.scalar())}
