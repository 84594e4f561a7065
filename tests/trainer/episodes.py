"""Episodes by hand, for tests: several turns with observations between them, and several segments in some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aligner.data.samples import Samples, pad_rows


@dataclass(frozen=True)
class Episode:
    """An episode as stretches of tokens."""

    parts: Sequence[tuple[Sequence[int], int]]
    """(tokens, number of the turn that sampled them; 0: context)."""
    new_segments: frozenset[int] = field(default=frozenset())
    """Indices of the parts that begin a segment, besides the first."""

    @property
    def tokens(self) -> list[int]:
        return [token for tokens, _ in self.parts for token in tokens]

    @property
    def turns(self) -> list[int]:
        return [turn for tokens, turn in self.parts for _ in tokens]

    @property
    def segments(self) -> list[int]:
        numbers, current = [], 0
        for index, (tokens, _) in enumerate(self.parts):
            current += index in self.new_segments
            numbers += [current] * len(tokens)
        return numbers


def as_samples(episodes: Sequence[Episode], rollout_logp_BT: Tensor | None = None) -> Samples:
    """One row for each episode."""
    turn_BT = pad_rows([one.turns for one in episodes], torch.int32)
    segmented = any(one.new_segments for one in episodes)
    return Samples(
        tokens_BT=pad_rows([one.tokens for one in episodes], torch.long),
        prompt_len_B=torch.tensor([len(one.parts[0][0]) for one in episodes]),
        length_B=torch.tensor([len(one.tokens) for one in episodes]),
        mask_BT=turn_BT > 0,
        prompt_index_B=torch.arange(len(episodes)),
        fields=[{"row": row} for row in range(len(episodes))],
        rollout_logp_BT=rollout_logp_BT,
        turn_BT=turn_BT,
        segment_BT=pad_rows([one.segments for one in episodes], torch.int32) if segmented else None,
    )


def drawn(seed: int, vocab: int) -> list[Episode]:
    """Two tasks with three episodes each: of one turn, of three in one context, of two and three contexts that begin alike, one
    that ends with an observation and one that was rewritten to what another begins with."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=generator).tolist()

    task, other, told = some(14), some(6), some(5)
    first = some(7)
    return [
        Episode([(task, 0), (some(5), 1)]),
        Episode([(task, 0), (some(4), 1), (some(3), 0), (some(6), 2), (some(2), 0), (some(1), 3)]),
        Episode(
            [(task, 0), (first, 1), (told, 0), (some(3), 2), (task + told, 0), (some(4), 3), (some(2), 0), (some(3), 4)],
            frozenset({4}),
        ),
        Episode([(other, 0), (some(3), 1), (some(4), 0)]),
        Episode(
            [(other, 0), (some(2), 1), (other + told, 0), (some(5), 2), (some(1), 0), (some(2), 3)], frozenset({2, 4})
        ),
        Episode([(task + first, 0), (some(3), 1), (other, 0), (some(1), 2)], frozenset({2})),
    ]  # fmt: skip
