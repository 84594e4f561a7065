"""One batch of samples that decode in lockstep: a token each per step, with one KV cache of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aligner.rollout.transformers.sampler import RowSampling, draw

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from aligner.rollout.config import Sampling
    from aligner.rollout.requests import Sample

_NO_TOKEN = -1
"""Fills a row's stop tokens up."""


@dataclass
class Row:
    """What a batch needs to know of a sample."""

    sample: Sample
    sampling: Sampling
    most: int
    """Tokens that it may get."""
    stop: Sequence[int]
    """Tokens that end it."""


@dataclass(frozen=True)
class Drawn:
    """What a row that has left its batch was given."""

    tokens: list[int]
    logp: list[float]
    stopped: bool
    """The last token is a stop token."""


class DecodingBatch:
    """Rows padded on the left to the longest of them; one that has ended leaves, with its part of the cache.

    The cache is made by the first step, and again by the one after `forget`, from the tokens so far. Rows with the same tokens
    (samples of one prompt) are read once.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], vocab: int, prefill_tokens: int) -> None:
        """Args:
        vocab: number of tokens that may be drawn; logits beyond are padding of the embedding.
        prefill_tokens: most tokens in one forward pass, where a step reads several of each row.
        """
        self._model, self._vocab, self._prefill_tokens = model, vocab, prefill_tokens
        device = model.device
        contexts = [[*row.sample.prompt, *row.sample.tokens] for row in rows]
        self._length = self._began = max(map(len, contexts))
        padded = [[0] * (self._length - len(context)) + context for context in contexts]
        space = max(row.most for row in rows)
        drawn_BN = torch.zeros(len(rows), space, dtype=torch.int64)
        self._tokens_BT = torch.cat([torch.tensor(padded, dtype=torch.int64), drawn_BN], 1).to(device)
        self._logp_BN = torch.zeros(len(rows), space, device=device)
        self._pad_B = torch.tensor([self._length - len(context) for context in contexts], device=device)
        self._most_B = torch.tensor([row.most for row in rows], device=device)
        width = max(1, *(len(row.stop) for row in rows))
        stops = [[*row.stop, *[_NO_TOKEN] * (width - len(row.stop))] for row in rows]
        self._stop_BS = torch.tensor(stops, dtype=torch.int64, device=device)
        seeds = [row.sample.seed for row in rows]
        self._sampling = RowSampling.of([row.sampling for row in rows], seeds, vocab, device)
        self._index = list(range(len(rows)))
        self._cache: DynamicCache | None = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def drawn(self) -> int:
        """Tokens that each row has been given."""
        return self._length - self._began

    def cache_bytes(self) -> int:
        """Size of the KV cache."""
        layers = self._cache.layers if self._cache is not None else ()
        held = [value for layer in layers for value in vars(layer).values()]
        # linear attention has its states in dictionaries
        states = [state for value in held for state in (value.values() if isinstance(value, dict) else [value])]
        return sum(state.nbytes for state in states if isinstance(state, Tensor))

    def forget(self) -> None:
        """Drop the KV cache."""
        self._cache = None

    def cut(self, place: int) -> None:
        """Let a row, by its place in the `rows` that the batch was made of, leave at the next step."""
        if place in self._index:
            self._most_B[self._index.index(place)] = 0

    @torch.no_grad()
    def step(self) -> dict[int, Drawn]:
        """A token for each row. Returns the rows that have ended, by their place in the `rows` that the batch was made of."""
        if self._cache is None:
            logits_BV = self._read()
        else:
            logits_BV = self._forward(self._tokens_BT, self._pad_B, self._length - 1, self._length)
        token_B, logp_B = draw(logits_BV[:, : self._vocab], self._sampling, self._length - self._pad_B)
        self._tokens_BT[:, self._length] = token_B
        self._logp_BN[:, self.drawn] = logp_B
        self._length += 1
        stopped_B = (self._stop_BS == token_B[:, None]).any(1)
        ended_B = stopped_B | (self._most_B <= self.drawn)
        ended = ended_B.nonzero()[:, 0].tolist()
        if not ended:
            return {}
        left = {self._index[row]: self._taken(row, bool(stopped_B[row])) for row in ended}
        self._keep((~ended_B).nonzero()[:, 0])
        return left

    def _taken(self, row: int, stopped: bool) -> Drawn:
        tokens = self._tokens_BT[row, self._began : self._length].tolist()
        return Drawn(tokens, self._logp_BN[row, : self.drawn].tolist(), stopped)

    def _keep(self, rows_B: Tensor) -> None:
        self._index = [self._index[row] for row in rows_B.tolist()]
        if not self._index:
            self._cache = None
            return
        for name in ("_tokens_BT", "_logp_BN", "_pad_B", "_most_B", "_stop_BS"):
            setattr(self, name, getattr(self, name)[rows_B])
        self._sampling = self._sampling.select(rows_B)
        if self._cache is not None:
            self._cache.reorder_cache(rows_B)

    def _read(self) -> Tensor:
        """The logits after all tokens so far, and their cache; different rows are read once, some columns at a time."""
        from transformers import DynamicCache
        from transformers.cache_utils import LinearAttentionCacheLayerMixin

        keyed = torch.cat([self._pad_B[:, None], self._tokens_BT[:, : self._length]], 1)
        different, row_B = torch.unique(keyed, dim=0, return_inverse=True)
        pad_U, tokens_UT = different[:, 0], different[:, 1:].contiguous()
        self._cache = DynamicCache(config=self._model.config)
        columns = max(1, self._prefill_tokens // len(tokens_UT))
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self._cache.layers):
            columns = self._length  # several models' linear attention takes its state up for single tokens only
        for first in range(0, self._length, columns):
            logits_UV = self._forward(tokens_UT, pad_U, first, min(first + columns, self._length))
        self._cache.reorder_cache(row_B)
        return logits_UV[row_B]

    def _forward(self, tokens_BT: Tensor, pad_B: Tensor, first: int, end: int) -> Tensor:
        """Logits [B, V] after column `end` - 1, of the columns from `first` on; what is before them is in the cache."""
        column_T = torch.arange(end, device=pad_B.device)
        outputs: Any = self._model(
            input_ids=tokens_BT[:, first:end],
            attention_mask=(column_T >= pad_B[:, None]).long(),
            position_ids=(column_T[first:] - pad_B[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]  # type: ignore[no-any-return]
