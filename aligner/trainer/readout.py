"""Readouts: log-probabilities, values or scores computed from a model head's output, by the names that losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from aligner.trainer.packing import Packed


class HeadOutput(Protocol):
    """The output of a model's head for the T tokens of a packed microbatch, however the training engine shards it."""

    def logprobs_and_entropy(self, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy of its distribution, with logits divided by `temperature`.

        Args:
            target_T: int64 token ids.

        Returns:
            (logp_T, entropy_T) in nats, [T] float32, equal on tensor-parallel ranks; differentiable.
        """

    def scalar(self) -> Tensor:
        """[T] float32: the output of a scalar head; differentiable."""


class Readout(Protocol):
    """Computes, from the head's output, what a role call returns and what losses receive."""

    dims: Any
    """Number of dimensions of its tensors: 2 for [B, T], 1 for [B]."""

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """Float32 tensors by name, 0 at tokens that another context-parallel rank holds. The first is the role call's result and
        a loss's first argument; a loss may take the others by name."""


@dataclass(frozen=True)
class LogProbs:
    """log p(token | preceding tokens) and the entropy of that distribution, at the predicted token's position."""

    temperature: float
    """Divides the logits."""
    dims = 2

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """policy_logp_BT and entropy_BT [B, T], in nats."""
        logp_T, entropy_T = head.logprobs_and_entropy(packed.targets_T, self.temperature)
        return {"policy_logp_BT": packed.to_rows(logp_T), "entropy_BT": packed.to_rows(entropy_T)}


class Values:
    """The value of the state before each token: the head's output at the preceding token."""

    dims = 2

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """value_BT [B, T]."""
        return {"value_BT": packed.to_rows(head.scalar())}


class Scores:
    """A row's score: the head's output at its last token, as in transformers' sequence classification."""

    dims = 1

    def __call__(self, head: HeadOutput, packed: Packed) -> dict[str, Tensor]:
        """score_B [B]."""
        return {"score_B": packed.at_ends(head.scalar())}
