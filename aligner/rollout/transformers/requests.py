"""Samples under way inside transformers' model: queued, decoded in batches, interrupted."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aligner.rollout.config import Sampling
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.requests import Request, Requests, Sample, tokens_left
from aligner.rollout.transformers.decoding import DecodingBatch, Drawn, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Live(Request):
    """A request."""

    row: Row | None = None
    may_go_on: bool = False
    """Its token limit is an interruption, not the response's end."""


@dataclass
class _Batch:
    """Requests that decode in lockstep."""

    decoding: DecodingBatch
    requests: list[_Live]
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(tokens drawn before, version of the weights from there on)."""


class BatchedRequests(Requests[_Live]):
    """The requests of one engine. Those that start together decode together; samples that are queued make the next batch
    once half of `max_num_seqs` is free: batches of equal age need no cache that grows by rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab: int,
        stop: Sequence[int],
        loaded: LoadedWeights,
        max_num_seqs: int,
        prefill_tokens: int,
        max_positions: int,
    ) -> None:
        """Args:
        max_positions: most tokens that the model's class can read: some keep a mask of that size (GPT-Neo).
        """
        super().__init__(stop, loaded)
        self._model, self._vocab, self._max_positions = model, vocab, max_positions
        self._max_num_seqs, self._prefill_tokens = max_num_seqs, prefill_tokens
        self._queue: deque[_Live] = deque()
        self._batches: list[_Batch] = []

    @property
    def under_way(self) -> int:
        """Samples in batches and in the queue."""
        return len(self._queue) + self._running

    @property
    def _running(self) -> int:
        return sum(len(batch.decoding) for batch in self._batches)

    def cache_bytes(self) -> int:
        """Size of all KV caches."""
        return sum(batch.decoding.cache_bytes() for batch in self._batches)

    def start(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """The longest go first, so that rows of a batch have similar lengths."""
        made, going_on = self._to_start(samples, sampling)
        for one in going_on:
            most, one.may_go_on = tokens_left(one.sample, sampling, step_tokens)
            stop = self.stop if sampling.stop_token_ids is None else sampling.stop_token_ids
            one.row, one.under_way = Row(one.sample, sampling, most, stop), True
            self._queue.append(one)
        return self._ticket(made)

    def advance(self) -> None:
        """A token for each running sample."""
        try:
            self._admit()
            for batch in self._batches:
                for place, drawn in batch.decoding.step().items():
                    one = batch.requests[place]
                    one.sample, one.under_way, one.row = _grown(one, drawn, batch.marks), False, None
            self._batches = [batch for batch in self._batches if len(batch.decoding)]
            self.progress()
        except BaseException:
            self.abort()
            raise

    def cancel(self, ticket: int) -> None:
        """Rows that decode leave their batch after its next token."""
        for one in self._tickets.pop(ticket):
            if one in self._queue:
                self._queue.remove(one)
            for batch in self._batches:
                for place, other in enumerate(batch.requests):
                    if other is one and one.under_way:
                        batch.decoding.cut(place)

    def abort(self) -> None:
        """Give up everything that is under way."""
        self._queue.clear()
        self._batches.clear()
        self._tickets.clear()

    def new_weights(self) -> None:
        """All rows of a batch have been given equally many tokens."""
        version = self._loaded.version
        for batch in self._batches:
            drawn = batch.decoding.drawn
            if batch.marks[-1][0] == drawn:
                batch.marks.pop()
            batch.marks.append((drawn, version))

    def forget_caches(self) -> None:
        """Drop all KV caches; what is under way is read anew at its next token."""
        for batch in self._batches:
            batch.decoding.forget()

    def _admit(self) -> None:
        free = self._max_num_seqs - self._running
        if not self._queue or free < min(len(self._queue), (self._max_num_seqs + 1) // 2):
            return
        requests = [self._queue.popleft() for _ in range(min(free, self._fitting()))]
        rows = [one.row for one in requests if one.row is not None]
        decoding = DecodingBatch(self._model, rows, self._vocab, self._prefill_tokens)
        self._batches.append(_Batch(decoding, requests, [(0, self._loaded.version)]))

    def _fitting(self) -> int:
        """How many of the queue, from its front, decode together: a batch has columns for its longest sample so far, and then for
        the most tokens that one may get, which can be more than the model has positions for."""
        longest = most = 0
        for number, row in enumerate(one.row for one in self._queue):
            assert row is not None, "what is queued has not begun"
            longest, most = max(longest, row.sample.row_tokens), max(most, row.most)
            if number and longest + most > self._max_positions:
                return number
        return len(self._queue)

    def _request(self, sample: Sample, number: int) -> _Live:
        return _Live(sample)


def _grown(one: _Live, drawn: Drawn, marks: Sequence[tuple[int, int]]) -> Sample:
    ends = [*(start for start, _ in marks[1:]), len(drawn.tokens)]
    versions = [
        version
        for (start, version), end in zip(marks, ends, strict=True)
        for _ in range(start, min(end, len(drawn.tokens)))
    ]
    before, goes_on = one.sample, one.may_go_on and not drawn.stopped
    return replace(
        before,
        tokens=[*before.tokens, *drawn.tokens],
        logp=[*before.logp, *drawn.logp],
        versions=[*before.versions, *versions],
        ended=not goes_on,
        truncated=not drawn.stopped and not goes_on,
    )
