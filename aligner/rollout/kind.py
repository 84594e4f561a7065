"""`RolloutKind`: what is generated for a row, as the role, its streams and checkpoints see it: a response, or an episode of several turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.rollout.config import Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.requests import Sample
from aligner.rollout.rows import completed_samples, request_seed, sample_from, sample_to


@dataclass(frozen=True)
class Place:
    """The place of a row in a run, from which all its seeds are made: nothing else decides what is drawn."""

    seed: int
    """The run's."""
    call: int
    """Number of the role call."""
    prompt: int
    """Place of its prompt in the call."""
    sample: int
    """Number among the prompt's samples."""

    def turn_seed(self, turn: int, key: int | None = None) -> int:
        """Seed of a turn, from 1; the first has that of a response at this place.

        Args:
            key: what makes the seed in place of the turn's number.
        """
        if key is not None:
            return request_seed(self.seed, self.call, self.prompt, self.sample, 0, key)
        if turn == 1:
            return request_seed(self.seed, self.call, self.prompt) + self.sample
        return request_seed(self.seed, self.call, self.prompt, self.sample, turn)

    @property
    def environment_seed(self) -> int:
        """The same for all samples of a prompt, which are compared with one another."""
        return request_seed(self.seed, self.call, self.prompt, 0, 0)


class Generated(Protocol):
    """One row as far as it has been generated."""

    @property
    def ended(self) -> bool:
        """Nothing more is to be generated."""
        ...

    @property
    def row_tokens(self) -> int:
        """Tokens of its row."""
        ...

    @property
    def token_sum(self) -> int:
        """Sum of the sampled token ids: equal on all ranks of a replica."""
        ...


U = TypeVar("U", bound=Generated)


class RolloutKind(ABC, Generic[U]):
    """Generation of one kind of row by one replica. All ranks of the replica make the same calls in the same order."""

    @abstractmethod
    def begin(self, prompt: Prompt, place: Place) -> U:
        """A row of which nothing is generated yet."""

    @abstractmethod
    def check(self, rollouts: Sequence[U], sampling: Sampling) -> None:
        """Raises ValueError where a row that was begun cannot be generated."""

    @abstractmethod
    def resume(self, rollouts: Sequence[U], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Take rows that have not ended into work.

        Args:
            step_tokens: interrupt a row when this many tokens have been sampled for it; None: never.

        Returns:
            What `finish` takes.

        Raises:
            RuntimeError: the engine has no valid weights.
        """

    @abstractmethod
    def finish(self, ticket: int) -> list[U]:
        """Generate until the rows of one `resume` have ended or are interrupted; in its order."""

    @abstractmethod
    def hold(self, rollouts: Sequence[U]) -> int:
        """Rows that have ended, as if they had been generated here: what `finish` takes."""

    @abstractmethod
    def held(self, ticket: int) -> list[U]:
        """The rows of one `resume` or `hold`, as they are."""

    @abstractmethod
    def work_until(self, enough: Callable[[], bool]) -> None:
        """Generate until `enough()`, asked on the replica's first rank before each token, or until nothing is left."""

    @abstractmethod
    def samples(self, prompts: Sequence[Prompt], rollouts: Sequence[U]) -> Samples:
        """Rows that have ended; rollout i is of prompt i."""

    @abstractmethod
    def to_json(self, rollout: U) -> dict[str, Any]:
        """A row as JSON."""

    @abstractmethod
    def from_json(self, saved: Mapping[str, Any], prompt: Prompt) -> U:
        """Inverse of `to_json`."""


class Responses(RolloutKind[Sample]):
    """A row is one response to its prompt."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def begin(self, prompt: Prompt, place: Place) -> Sample:
        """Nothing is drawn."""
        return Sample(list(prompt.tokens), place.turn_seed(1))

    def check(self, rollouts: Sequence[Sample], sampling: Sampling) -> None:
        """See `RolloutEngine.check`."""
        self._engine.check([one.prompt for one in rollouts], sampling)

    def resume(self, rollouts: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """See `RolloutEngine.resume`."""
        return self._engine.resume(rollouts, sampling, step_tokens)

    def finish(self, ticket: int) -> list[Sample]:
        """See `RolloutEngine.finish`."""
        return self._engine.finish(ticket)

    def hold(self, rollouts: Sequence[Sample]) -> int:
        """See `Requests.hold`."""
        return self._engine.requests.hold(rollouts)

    def held(self, ticket: int) -> list[Sample]:
        """See `Requests.held`."""
        return self._engine.requests.held(ticket)

    def work_until(self, enough: Callable[[], bool]) -> None:
        """See `RolloutEngine.work_until`."""
        self._engine.work_until(enough)

    def samples(self, prompts: Sequence[Prompt], rollouts: Sequence[Sample]) -> Samples:
        """See `completed_samples`."""
        return completed_samples(prompts, rollouts)

    def to_json(self, rollout: Sample) -> dict[str, Any]:
        """With the state of its random stream."""
        return sample_to(rollout)

    def from_json(self, saved: Mapping[str, Any], prompt: Prompt) -> Sample:
        """Inverse of `to_json`."""
        return sample_from(saved)
