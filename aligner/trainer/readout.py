"""What a role reads out of its model's head for a microbatch: log-probabilities, values or scores, by the names that losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from aligner.trainer.packing import Packed


class HeadOutput(Protocol):
    """What the model's head gives for the T tokens of a packed microbatch, however the training engine shards it."""

    def logprobs_and_entropy(
        self, source_N: Tensor, target_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target and entropy of its distribution, of logits divided by `temperature`. Only the tokens that
        predict a target pass through the output layer.

        Args:
            source_N: int64, the tokens that predict, of the T.
            target_N: int64 token ids.

        Returns:
            (logp_N, entropy_N) in nats, [N] float32, equal on tensor-parallel ranks; differentiable. None for the entropy
            without `with_entropy`.
        """

    def scalar(self) -> Tensor:
        """[T] float32: the output of a scalar head; differentiable."""


class Readout(Protocol):
    """From the head's output to what a role returns, and what its losses are given."""

    dims: Any
    """Dimensions of what it makes: 2 for [B, T], 1 for [B]."""

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """Float32 tensors by name, 0 outside the wanted predictions and at tokens that another context rank holds. The first
        is the role's result and a loss's first argument; a loss may ask for the others by name.

        Args:
            first_only: the others may be left out.
        """


@dataclass(frozen=True)
class LogProbs:
    """log p(token | tokens before it) and the entropy of that distribution, at the predicted token's place."""

    temperature: float
    """Divides the logits."""
    dims = 2

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """policy_logp_BT and entropy_BT, nats."""
        logp_N, entropy_N = head.logprobs_and_entropy(
            packed.source_N, packed.predicted_N, self.temperature, with_entropy=not first_only
        )
        of_tokens = {"policy_logp_BT": logp_N} | ({} if entropy_N is None else {"entropy_BT": entropy_N})
        return {name: packed.to_rows(value_N) for name, value_N in of_tokens.items()}


class Values:
    """The value of the state before each token: the head's output at the token before it."""

    dims = 2

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """value_BT."""
        return {"value_BT": packed.to_rows(head.scalar()[packed.source_N])}


class Scores:
    """A row's score: the head's output at its last token, where transformers reads it too."""

    dims = 1

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """score_B."""
        return {"score_B": packed.at_ends(head.scalar())}
