"""Episodes that have ended, as rows of `Samples`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aligner.data.samples import Samples, pad_rows
from aligner.rollout.episodes.episode import Episode

LIMITS = ("max_turns", "max_tokens")
"""Endings by a limit."""


def episode_samples(episodes: Sequence[Episode]) -> Samples:
    """One row for each episode: its contexts and what was sampled, one after the other, each id once in its segment."""
    rows = [_Row(episode) for episode in episodes]
    ends = [_end(episode) for episode in episodes]
    several = any(row.segment and row.segment[-1] for row in rows)
    return Samples(
        tokens_BT=pad_rows([row.tokens for row in rows], torch.long),
        prompt_len_B=torch.tensor([row.prompt_len for row in rows], dtype=torch.long),
        length_B=torch.tensor([len(row.tokens) for row in rows], dtype=torch.long),
        mask_BT=pad_rows([row.turn for row in rows], torch.int32) > 0,
        prompt_index_B=torch.tensor([episode.task.index for episode in episodes], dtype=torch.long),
        fields=[{"prompt": episode.task.text, **episode.task.fields} for episode in episodes],
        rollout_logp_BT=pad_rows([row.logp for row in rows], torch.float32),
        truncated_B=torch.tensor(
            [end.ended in LIMITS or row.cut for end, row in zip(ends, rows, strict=True)], dtype=torch.bool
        ),
        version_BT=pad_rows([row.version for row in rows], torch.int32),
        turn_BT=pad_rows([row.turn for row in rows], torch.int32),
        segment_BT=pad_rows([row.segment for row in rows], torch.int32) if several else None,
        turn_reward_BT=pad_rows([row.turn_reward for row in rows], torch.float32),
        episode_reward_B=torch.tensor([end.reward for end in ends], dtype=torch.float32),
        episodes=[_record(episode) for episode in episodes],
    )


class _Row:
    """Values of each token."""

    def __init__(self, episode: Episode) -> None:
        turns, end = episode.turns, _end(episode)
        first = turns[0].added if turns else episode.task.tokens
        self.prompt_len = len(first)
        self.cut = bool(turns) and turns[-1].sample.truncated
        """The last turn reached its limit without a stop token."""
        self.tokens: list[int] = [] if turns else list(first)
        self.turn: list[int] = [0] * len(self.tokens)
        self.segment: list[int] = [0] * len(self.tokens)
        self.logp: list[float] = [0.0] * len(self.tokens)
        self.version: list[int] = [0] * len(self.tokens)
        self.turn_reward: list[float] = [0.0] * len(self.tokens)
        segment = -1 if turns and turns[0].new_segment else 0
        for number, (turn, reward) in enumerate(zip(turns, end.turn_rewards, strict=True), 1):
            segment += turn.new_segment
            sample, before = turn.sample, [0] * len(turn.added)
            self.tokens += [*turn.added, *sample.tokens]
            self.turn += [*before, *[number] * len(sample.tokens)]
            self.segment += [segment] * (len(turn.added) + len(sample.tokens))
            self.logp += [*before, *sample.logp]
            self.version += [*before, *sample.versions]
            self.turn_reward += [0.0] * (len(turn.added) + len(sample.tokens))
            self.turn_reward[-1] = reward


def _end(episode: Episode) -> Any:
    assert episode.end is not None, "an episode that has not ended is no row"
    return episode.end


def _record(episode: Episode) -> dict[str, Any]:
    end = _end(episode)
    return {
        "detail": "",
        "metrics": {},
        "messages": [],
        **end.record,
        "ended": end.ended,
        "turns": len(episode.turns),
        "seed": episode.place.environment_seed,
        "sampled_tokens": sum(len(turn.sample.tokens) for turn in episode.turns),
    }
