"""`Samples`: the batch type that all roles exchange, and the legend of shape suffixes for the whole project.

Shape suffixes:
    B   rows: one sample each         T   tokens, right-padded to the longest row
    P   prompts                       G   samples per prompt (a group)
    V   vocabulary                    H   hidden size
Agents: an *episode* (one playthrough of one task) is one row. A *turn* is one generation by the policy inside an episode; a *segment*
is a stretch of tokens that is one context: an episode has one, and a new one begins where its history was compacted or rewritten.
`x_logp_BT[b, t]` is the log-probability of token t given the tokens of its segment before it, computed by x (policy, rollout, reference);
it is 0 where `mask_BT` is False. No array is shifted by one position outside `trainer/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NewType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """A batch of rows (CPU tensors): prompt + response, or an episode's segments one after the other."""

    tokens_BT: Tensor
    """int64: prompt, response, zero padding. An episode's: its first context, then what the policy sampled and what it was
    told (tool results, user turns) in turns."""
    prompt_len_B: Tensor
    """int64: number of prompt tokens; of an episode those of its first context."""
    length_B: Tensor
    """int64: number of tokens before the padding."""
    mask_BT: Tensor
    """bool: the trained tokens (the response, including its stop token; of an episode the sampled tokens only)."""
    prompt_index_B: Tensor
    """int64: index of the row's prompt, answer or pair in its data set."""
    fields: list[dict[str, Any]]
    """The prompt's JSON fields (answer, ...), per row."""
    rollout_logp_BT: Tensor | None = None
    """float32: log-probability of the sampled token from the rollout engine, after temperature."""
    truncated_B: Tensor | None = None
    """bool: the response reached its token limit."""
    version_BT: Tensor | None = None
    """int32: version of the policy's weights (number of updates) that sampled the token; 0 at tokens that were not sampled."""
    turn_BT: Tensor | None = None
    """int32: number (from 1) of the turn that sampled the token, ascending in a row; 0 at tokens that were not sampled. None:
    single-turn generation."""
    segment_BT: Tensor | None = field(default=None, metadata={"absent": 0})
    """int32: segment of each token, from 0, ascending in a row by at most 1. A segment is a context of its own: the trainer starts
    positions at 0 in each, and no token attends to another segment, so its first token, which nothing predicts, is never
    sampled. None: every row is one segment."""
    turn_reward_BT: Tensor | None = None
    """float32: what the environment gave after a turn, at that turn's last sampled token; 0 elsewhere."""
    episode_reward_B: Tensor | None = None
    """float32: the episode's reward, by default the sum of its turn rewards and its final one; NaN where the episode failed."""
    episodes: list[dict[str, Any]] | None = None
    """JSON per row: how an episode "ended" ("done", "max_turns", "max_tokens" or the kind of its failure), "detail", "turns" (their
    number), "metrics", "messages", "seed" (the environment's)."""

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens_BT.shape[0]

    @property
    def response_len_B(self) -> Tensor:
        """int64: number of tokens of the response; of an episode those that were sampled, in all of its turns."""
        return self.length_B - self.prompt_len_B if self.turn_BT is None else (self.turn_BT > 0).sum(1)

    def response_tokens(self, row: int) -> list[int]:
        """The token ids after the prompt, including the stop token; of an episode those that were not sampled too."""
        return self.tokens_BT[row, self.prompt_len_B[row] : self.length_B[row]].tolist()

    def last_turn_tokens(self, row: int) -> list[int]:
        """The token ids that an episode's last turn sampled (none where it failed before it had one), or the response's."""
        if self.turn_BT is None:
            return self.response_tokens(row)
        turn_T = self.turn_BT[row]
        return self.tokens_BT[row, (turn_T > 0) & (turn_T == turn_T.max())].tolist()


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
