"""`Samples`: what every role reads and writes, and the shape legend of the whole project.

Shape suffixes:
    B   rows: one sample each         T   tokens, right-padded to the longest row held here
    P   prompts                       G   samples of one prompt (a group)
    V   vocabulary                    H   hidden size
`x_logp_BT[b, t]` is the log-probability of token t given the tokens before it, by producer x; it is 0 where
`mask_BT` is False. No array is shifted by one outside `policy/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NewType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Rows of prompt + response tokens on the host (CPU tensors)."""

    tokens_BT: Tensor
    """int64: prompt, then response, then zeros."""
    prompt_len_B: Tensor
    """int64: tokens of the prompt."""
    length_B: Tensor
    """int64: tokens of prompt and response."""
    mask_BT: Tensor
    """bool: the tokens that are trained on (the response, stop token included)."""
    prompt_index_B: Tensor
    """int64: position of the row's prompt, answer or pair among the data of its kind, in the order of their source."""
    fields: list[dict[str, Any]]
    """The prompt's own JSON fields (answer, ...), per row."""
    rollout_logp_BT: Tensor | None = None
    """float32: log-probability by the rollout engine that sampled the token, after temperature."""
    truncated_B: Tensor | None = None
    """bool: the response ran into its token limit."""
    version_BT: Tensor | None = None
    """int32: version of the policy's weights (updates so far) that drew the token; 0 outside the response."""

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens_BT.shape[0]

    def response_tokens(self, row: int) -> list[int]:
        """The response's token ids, stop token included."""
        return self.tokens_BT[row, self.prompt_len_B[row] : self.length_B[row]].tolist()


Demonstrations = NewType("Demonstrations", Samples)
"""A batch of answers to imitate."""
Pairs = NewType("Pairs", Samples)
"""A batch in which rows 2i and 2i+1 answer one prompt: the chosen answer, then the rejected one."""
Feedback = NewType("Feedback", Samples)
"""A batch of answers that are good or bad: `fields[b]["label"]`."""


def leave_out_unscored(samples: Samples, reward_B: Tensor) -> Samples:
    """Rows whose reward is NaN (failed, timed out, unparsable) train nothing: not by reward, KL or entropy, and they
    do not count in the loss's denominators."""
    scored_B = ~torch.isnan(reward_B)
    return samples if bool(scored_B.all()) else replace(samples, mask_BT=samples.mask_BT & scored_B[:, None])


def pad_rows(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Ragged rows -> [B, T], right-padded with 0 to the longest row."""
    width = max((len(row) for row in rows), default=0)
    out = torch.zeros(len(rows), width, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out
