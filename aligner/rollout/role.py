"""The rollout role: generation, and streams of generated batches that are checkpointed with a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aligner.data.prompts import Prompt
from aligner.rollout.ahead import Ahead
from aligner.rollout.generation import GenerationRole
from aligner.rollout.partial import Partial
from aligner.spmd.ref import Ref


class Rollout(GenerationRole):
    """An engine on this role's ranks, with the streams of batches that a loop has asked for."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # as GenerationRole
        super().__init__(*arguments, **settings)
        self._streams: list[Ahead | Partial] = []
        self._saved: list[Any] = []

    def stream(
        self, prompts: Iterable[Sequence[Prompt]], num_samples: int = 1, lag: int | None = None
    ) -> Iterator[Ref]:
        """`generate` for each batch of prompts, `lag` batches (`stream.lag`) ahead of the one that is handed out.

        What is ahead is generated while the other roles work on what was handed out, where these have other ranks. It
        is drawn by the weights that were there when it was started, or, with `stream.in_flight`, by newer ones from the
        token on at which these arrive; `Samples.version_BT` says which. With lag=0 this is `generate`, bit for bit.
        With `stream.step_tokens` long responses are carried over: see `partial.Partial`.
        """
        saved = self._saved.pop(0) if self._saved else None
        kind: Any = Ahead if self.overlap.step_tokens is None else Partial
        self._streams.append(kind(self, prompts, num_samples, self.overlap.lag if lag is None else lag, saved))
        return self._streams[-1]

    def save_state(self) -> dict[str, Any]:
        """What the rest of a run depends on, as JSON; what is under way is completed first. A role call of every rank.

        Samples are there on the first rank of the world only.
        """
        with self.working():
            if self.member:
                self.complete()
        return {"calls": self.calls, "streams": [stream.state() for stream in self._streams]}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from a `save_state`, whatever the layout: the next streams to be asked for take up what it has."""
        self.calls, self._saved = saved["calls"], list(saved["streams"])
