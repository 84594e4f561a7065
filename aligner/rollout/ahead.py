"""Asynchronous generation: batches are started `lag` steps before they are returned; pending ones can be checkpointed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aligner.data.prompts import Prompt
from aligner.rollout.generation import GenerationRole, Started
from aligner.spmd.ref import Ref


class Ahead(Iterator[Ref]):
    """Iterator over generated batches (a Ref to Samples each), started `lag` batches ahead; see `Rollout.stream`."""

    def __init__(
        self,
        rollout: GenerationRole,
        prompts: Iterable[Sequence[Prompt]],
        num_samples: int,
        lag: int,
        saved: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._rollout, self._prompts, self._num_samples, self._lag = rollout, iter(prompts), num_samples, lag
        self._queue: deque[Started] = deque(rollout.load_pending(one, num_samples) for one in saved or ())

    def __next__(self) -> Ref:
        rollout, lag = self._rollout, self._lag
        if not lag and not self._queue:
            return rollout.sample(next(self._prompts), self._num_samples)
        while len(self._queue) <= lag:
            batch = next(self._prompts, None)
            if batch is None:  # the prompts are a finite iterable
                break
            self._queue.append(rollout.start(batch, self._num_samples))
        if not self._queue:
            raise StopIteration
        return rollout.finish(self._queue.popleft())

    def state(self) -> list[dict[str, Any]]:
        """Pending batches, once completed, as JSON; samples on rank 0 only. Collective over the world."""
        return [self._rollout.save_pending(started) for started in self._queue]
