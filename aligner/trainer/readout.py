"""What the last stage makes of a microbatch: log-probabilities, values or scores, by the names that losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from aligner.trainer.packing import Packed
from aligner.trainer.vocab_parallel import logprobs_and_entropy


class Readout(Protocol):
    """From the head's output to what a role returns, and what its losses are given."""

    dims: Any
    """Dimensions of what it makes: 2 for [B, T], 1 for [B]."""

    def __call__(self, output_TX: Tensor, packed: Packed) -> dict[str, Tensor]:
        """The head's output on the packed tokens -> float32 tensors by name, 0 at what another context rank holds. The
        first is the role's result and a loss's first argument; a loss may ask for the others by name."""


@dataclass(frozen=True)
class LogProbs:
    """log p(token | tokens before it) and the entropy of that distribution, at the predicted token's place."""

    group: dist.ProcessGroup
    """Tensor-parallel."""
    vocab: int
    """True size of the vocabulary."""
    temperature: float
    """Divides the logits."""
    dims = 2

    def __call__(self, output_TX: Tensor, packed: Packed) -> dict[str, Tensor]:
        """Logits [T, V / tensor] -> policy_logp_BT and entropy_BT, nats."""
        if self.temperature != 1.0:
            output_TX = output_TX / self.temperature
        logp_T, entropy_T = logprobs_and_entropy(output_TX, packed.targets_T, self.group, self.vocab)
        return {"policy_logp_BT": packed.to_rows(logp_T), "entropy_BT": packed.to_rows(entropy_T)}


class Values:
    """The value of the state before each token: the head's output at the token before it."""

    dims = 2

    def __call__(self, output_TX: Tensor, packed: Packed) -> dict[str, Tensor]:
        """[T, 1] -> value_BT."""
        return {"value_BT": packed.to_rows(output_TX[:, 0])}


class Scores:
    """A row's score: the head's output at its last token, where transformers reads it too."""

    dims = 1

    def __call__(self, output_TX: Tensor, packed: Packed) -> dict[str, Tensor]:
        """[T, 1] -> score_B."""
        return {"score_B": packed.at_ends(output_TX[:, 0])}
