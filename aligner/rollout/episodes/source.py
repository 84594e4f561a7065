"""`EpisodeSource`: what plays the episodes that a replica samples turns for (environments, agent programs), as the rollout sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aligner.data.prompts import Prompt
from aligner.rollout.requests import Sample


@dataclass(frozen=True)
class Ask:
    """An episode wants a turn sampled."""

    episode: int
    """The episode's key: its row's number in this play."""
    turn: int
    """Number of the turn in its episode, from 1, in the order in which they are asked for."""
    context: tuple[int, ...]
    """Token ids of the whole context that the turn continues."""
    new_segment: bool
    """False: the turn asked for before this one is over, and the context is all ids of its segment, the sampled ones exactly as
    they were sampled, and a suffix of ids that were not sampled. True: the context begins a segment of its own (the first turn,
    one that is asked for while the turn before is sampled, a history that was compacted, branched or rewritten)."""
    max_tokens: int | None = None
    """Most tokens to sample in this turn; None: what sampling.max_tokens and the context length allow."""
    seed_key: int | None = None
    """Makes the turn's seed in place of its number: for an agent whose requests come in any order. None: the number does."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What the agent asked for. `stop_token_ids` end the turn as well as the run's; temperature, top_p and top_k are the run's,
    whatever an agent asks for: the policy's log-probabilities are those of the run's distribution. Never a seed: that is made of
    (run seed, call, task, sample, turn)."""


@dataclass(frozen=True)
class Ended:
    """An episode has come to its end, or has failed."""

    episode: int
    reward: float
    """The episode's reward; NaN where the episode failed."""
    turn_rewards: tuple[float, ...]
    """What the environment gave after each turn; one for each turn that was sampled to its end."""
    ended: str
    """"done", "max_turns", "max_tokens", or the failure's kind: "timeout", "crashed", "memory", "protocol", "episode_timeout", ..."""
    record: Mapping[str, Any]
    """{"detail": str, "metrics": {name: float}, "messages": [...]} as JSON, for reports, saved samples and replay."""
    order: tuple[int, ...] = ()
    """Numbers of the turns that are over in the order in which they stand in the episode's row, where that is not the order in which
    they were asked for; `turn_rewards` have the row's order."""


class EpisodeSource(Protocol):
    """Plays episodes; the rollout samples their turns.

    Lives on the first rank of each replica only. No method blocks, except `poll`, for at most the time that it is given.
    What fails inside one episode ends that episode (`Ended` with the failure's kind and a NaN reward); an exception ends the job.
    """

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        """Begin an episode; its first `Ask` or its `Ended` comes from a later `poll`.

        Args:
            episode: key of the episode in all that follows; used once only.
            task: `fields` are the row, `tokens` the rendered first context.
            seed: what the environment may draw its own randomness from: the same for the same place in the run.
        """
        ...

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        """What has become ready since the last call. An episode may have several turns open at once; each gets its `answer` when it
        has been sampled.

        Args:
            wait_s: seconds to wait for the first of them; 0: return at once.
        """
        ...

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        """The turn that was asked for.

        Args:
            sample: its tokens, the stop token included where one was sampled, their log-probabilities and weight versions;
                `truncated` where max_tokens ended it.
        """
        ...

    def pause(self, episode: int) -> None:
        """The turn that the episode has asked for will be answered in a later step only (partial rollouts): until then it takes no
        place from others, which must be able to begin while it is open."""
        ...

    def abandon(self, episodes: Collection[int]) -> None:
        """Give these episodes up; nothing more comes from them."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, by the names of the metrics registry."""
        ...

    def close(self) -> None:
        """Abandon all episodes and free processes and ports."""
        ...
