"""Readouts: log-probabilities, values or scores computed from a model head's output, by the names that losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from aligner.trainer.packing import Keep, Packed


class HeadOutput(Protocol):
    """The output of a model's head for the K kept tokens of a packed microbatch, however the training engine shards it."""

    def logprobs_and_entropy(
        self, source_N: Tensor, target_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target and entropy of its distribution, with logits divided by `temperature`. Only the tokens
        that predict a target pass through the output layer.

        Args:
            source_N: int64, the tokens that predict, of the K.
            target_N: int64 token ids.

        Returns:
            (logp_N, entropy_N) in nats, [N] float32, equal on tensor-parallel ranks; differentiable. None for the entropy
            without `with_entropy`.
        """

    def scalar(self) -> Tensor:
        """[K] float32: the output of a scalar head; differentiable."""


class Readout(Protocol):
    """Computes, from the head's output, what a role call returns and what losses receive."""

    dims: Any
    """Number of dimensions of its tensors: 2 for [B, T], 1 for [B]."""
    uses: Keep
    """The tokens that it reads the head's output of."""

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """Float32 tensors by name, 0 outside the used predictions and at tokens that another context-parallel rank holds. The
        first is the role call's result and a loss's first argument; a loss may take the others by name.

        Args:
            first_only: the others may be left out.
        """


@dataclass(frozen=True)
class LogProbs:
    """log p(token | preceding tokens) and the entropy of that distribution, at the predicted token's position."""

    temperature: float
    """Divides the logits."""
    dims = 2
    uses = Keep.PREDICTIONS

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """policy_logp_BT and entropy_BT [B, T], in nats."""
        logp_N, entropy_N = head.logprobs_and_entropy(
            packed.source_N, packed.predicted_N, self.temperature, with_entropy=not first_only
        )
        readouts = {"policy_logp_BT": packed.to_rows(logp_N)}
        return readouts if entropy_N is None else {**readouts, "entropy_BT": packed.to_rows(entropy_N)}


class Values:
    """The value of the state before each token: the head's output at the preceding token."""

    dims = 2
    uses = Keep.PREDICTIONS

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """value_BT [B, T]."""
        return {"value_BT": packed.to_rows(head.scalar()[packed.source_N])}


class Scores:
    """A row's score: the head's output at its last token, as in transformers' sequence classification."""

    dims = 1
    uses = Keep.ENDS

    def __call__(self, head: HeadOutput, packed: Packed, first_only: bool = False) -> dict[str, Tensor]:
        """score_B [B]."""
        return {"score_B": packed.at_ends(head.scalar())}
