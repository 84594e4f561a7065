"""`Samples`: the batch type that all roles exchange, and the legend of shape suffixes for the whole project.

Shape suffixes:
    B   rows: one sample each         T   tokens, right-padded to the longest row
    P   prompts                       G   samples per prompt (a group)
    V   vocabulary                    H   hidden size
`x_logp_BT[b, t]` is the log-probability of token t given the tokens before it, computed by x (policy, rollout, reference);
it is 0 where `mask_BT` is False. No array is shifted by one position outside `trainer/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NewType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """A batch of rows of prompt + response tokens (CPU tensors)."""

    tokens_BT: Tensor
    """int64: prompt, response, zero padding."""
    prompt_len_B: Tensor
    """int64: number of prompt tokens."""
    length_B: Tensor
    """int64: number of prompt and response tokens."""
    mask_BT: Tensor
    """bool: the trained tokens (the response, including its stop token)."""
    prompt_index_B: Tensor
    """int64: index of the row's prompt, answer or pair in its data set."""
    fields: list[dict[str, Any]]
    """The prompt's JSON fields (answer, ...), per row."""
    rollout_logp_BT: Tensor | None = None
    """float32: log-probability of the sampled token from the rollout engine, after temperature."""
    truncated_B: Tensor | None = None
    """bool: the response reached its token limit."""
    version_BT: Tensor | None = None
    """int32: version of the policy's weights (number of updates) that sampled the token; 0 outside the response."""

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens_BT.shape[0]

    def response_tokens(self, row: int) -> list[int]:
        """The response's token ids, including the stop token."""
        return self.tokens_BT[row, self.prompt_len_B[row] : self.length_B[row]].tolist()


Demonstrations = NewType("Demonstrations", Samples)
"""A batch of demonstrations (SFT)."""
Pairs = NewType("Pairs", Samples)
"""A batch of preference pairs: rows 2i and 2i+1 are the chosen and the rejected answer to one prompt."""
Feedback = NewType("Feedback", Samples)
"""A batch of labelled answers: `fields[b]["label"]` is True for a good one."""


def leave_out_unscored(samples: Samples, reward_B: Tensor) -> Samples:
    """Mask out rows whose reward is NaN (failed, timed out, unparsable): they get no gradient from any term and do not count
    in the loss's denominators."""
    scored_B = ~torch.isnan(reward_B)
    return samples if bool(scored_B.all()) else replace(samples, mask_BT=samples.mask_BT & scored_B[:, None])


def pad_rows(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Ragged rows -> [B, T], right-padded with 0 to the longest row."""
    width = max((len(row) for row in rows), default=0)
    padded = torch.zeros(len(rows), width, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return padded
