"""Samples under way inside an engine: started, advanced a token at a time, interrupted, collected with who drew each token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from torch import Tensor

from aligner.rollout.config import Sampling
from aligner.rollout.loaded import LoadedWeights


@dataclass(frozen=True)
class Sample:
    """One response as far as it has been drawn."""

    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    """Drawn token ids, with the stop token where one was drawn."""
    logp: list[float] = field(default_factory=list)
    """log p of each token under the distribution it was drawn from: after temperature, top-k and top-p."""
    versions: list[int] = field(default_factory=list)
    """Version of the weights that drew each token."""
    ended: bool = False
    """A stop token was drawn, or max_tokens reached."""
    truncated: bool = False
    """max_tokens was reached without a stop token."""
    draws: Tensor | None = field(default=None, repr=False, compare=False)
    """State of the sample's random stream where it was interrupted, if it has one."""

    @property
    def row_tokens(self) -> int:
        """Tokens of its row."""
        return len(self.prompt) + len(self.tokens)

    @property
    def token_sum(self) -> int:
        """Sum of the drawn token ids: equal on all ranks of a replica."""
        return sum(self.tokens)


@dataclass
class Request:
    """A sample in an engine."""

    sample: Sample
    under_way: bool = False
    """It has not left the engine."""


R = TypeVar("R", bound=Request)


class Requests(ABC, Generic[R]):
    """The requests of one engine. All ranks of a replica make the same calls in the same order.

    A sample that is interrupted is no longer in the engine; it goes on as a request of prompt and tokens, and so draws
    what it would have drawn without the interruption.
    """

    def __init__(self, stop: Sequence[int], loaded: LoadedWeights) -> None:
        """Args:
        stop: tokens that end a response where sampling names none.
        """
        self.stop, self._loaded = tuple(stop), loaded
        self._tickets: dict[int, list[R]] = {}
        self._started = 0
        self.progress: Callable[[], None] = lambda: None
        """Called after each engine step."""

    # ---- what an engine implements

    @property
    @abstractmethod
    def under_way(self) -> int:
        """Samples inside the engine."""

    @abstractmethod
    def start(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Hand samples that have not ended to the engine; nothing is drawn yet.

        Args:
            step_tokens: interrupt a sample when this many tokens have been added to it; None: never.

        Returns:
            What `finish` takes.
        """

    @abstractmethod
    def advance(self) -> None:
        """One engine step: about one token for each sample that has room."""

    @abstractmethod
    def cancel(self, ticket: int) -> None:
        """Give up the samples of one `start`, which is then forgotten; whatever has left the engine is lost too."""

    @abstractmethod
    def abort(self) -> None:
        """Give up everything that is under way."""

    @abstractmethod
    def new_weights(self) -> None:
        """What is drawn from here on is drawn by the weights that the engine holds now."""

    # ---- the same for all

    def ended(self, ticket: int) -> bool:
        """Whether all samples of one `start` have left the engine."""
        return not any(one.under_way for one in self._tickets[ticket])

    def hold(self, samples: Sequence[Sample]) -> int:
        """Samples that have left the engine, or another one, as if it had been started here: what `finish` takes."""
        return self._ticket([self._request(sample, number) for number, sample in enumerate(samples)])

    def held(self, ticket: int) -> list[Sample]:
        """The samples of one `start` or `hold`, as far as they have left the engine."""
        return [one.sample for one in self._tickets[ticket]]

    def finish(self, ticket: int) -> list[Sample]:
        """The samples of one `start`, in its order, after all have left the engine."""
        while not self.ended(ticket):
            self.advance()
        return [one.sample for one in self._tickets.pop(ticket)]

    @abstractmethod
    def _request(self, sample: Sample, number: int) -> R:
        """Sample `number` of the ticket that is made next, not yet under way."""

    def _to_start(self, samples: Sequence[Sample], sampling: Sampling) -> tuple[list[R], list[R]]:
        """(requests of one `start`, those of them that go into the engine, the longest first). A sample that already has
        max_tokens, which were more when it was interrupted, has ended."""
        made = []
        for number, sample in enumerate(samples):
            if len(sample.tokens) >= sampling.max_tokens:
                sample = replace(sample, ended=True, truncated=True)
            made.append(self._request(sample, number))
        going_on = [one for one in made if not one.sample.ended]
        return made, sorted(going_on, key=lambda one: -len(one.sample.prompt) - len(one.sample.tokens))

    def _ticket(self, requests: list[R]) -> int:
        self._started += 1
        self._tickets[self._started] = requests
        return self._started


def tokens_left(sample: Sample, sampling: Sampling, step_tokens: int | None) -> tuple[int, bool]:
    """(most tokens that the sample may get now, whether it goes on in a later request when it has got them)."""
    assert not sample.ended, "a sample that has ended cannot go on"
    left = sampling.max_tokens - len(sample.tokens)
    most = left if step_tokens is None else min(left, step_tokens)
    return most, most < left
