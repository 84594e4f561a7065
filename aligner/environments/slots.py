"""The places of open episodes: an episode with the calls it has made, a process with the episodes in it, and their time limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aligner.environments.blame import Call
from aligner.environments.config import EnvironmentConfig
from aligner.environments.process import EnvironmentProcess


@dataclass(eq=False)
class OpenEpisode:
    """An open episode, wherever it is."""

    number: int
    calls: list[dict[str, Any]]
    """Every call so far, in order: open, steps, finish."""
    answers: list[str] = field(default_factory=list)
    """What must be the same when it is replayed, for each call that was answered."""
    position: int = 0
    """Calls that its present process has answered."""
    process: EnvironmentProcess | None = None
    running: Call | None = None
    alone: bool = False
    """It gets a process for itself: it may have ended one that others were in."""
    losses: int = 0
    seconds: float = 0.0
    """Time in its environment, without replays."""
    paused: bool = False
    """Its next call comes after a pause in which it takes no place."""
    dropped: bool = False
    """Nobody waits for it any more, but its call still runs."""


@dataclass
class Slot:
    """A process and the episodes in it."""

    process: EnvironmentProcess
    ready: bool = False
    episodes: dict[int, OpenEpisode] = field(default_factory=dict)
    extra: bool = False
    """Started for an episode alone; ended with it."""
    heard_at: float = 0.0
    """When its last answer came; time.monotonic() seconds."""
    silent: bool = False
    """It was asked for a sign of life that has not come."""

    @property
    def taken(self) -> int:
        """Places of the process that are taken."""
        return sum(not one.paused for one in self.episodes.values())

    def begun(self) -> list[OpenEpisode]:
        """Episodes whose call runs now."""
        return [one for one in self.episodes.values() if one.running and one.running.begun_at is not None]

    def postpone(self, seconds: float, now: float) -> None:
        """Let all that has a limit count as if it had begun so much later, but not after now."""
        self.process.started_at = min(self.process.started_at + seconds, now)
        self.heard_at = min(self.heard_at + seconds, now)
        for call in (one.running for one in self.episodes.values() if one.running):
            call.sent_at = min(call.sent_at + seconds, now)
            if call.begun_at is not None:
                call.begun_at = min(call.begun_at + seconds, now)

    def limits(self, config: EnvironmentConfig) -> list[tuple[OpenEpisode, float]]:
        """When the call of each episode that has one must be over, by time.monotonic(). One that waits for others of the
        process has no limit yet; where none runs, it should have begun, and its limit counts from the last answer."""
        waits, limits = bool(self.begun()), []
        for episode in self.episodes.values():
            call = episode.running
            if call is None:
                continue
            limit_s = config.step_timeout_s
            if config.episode_timeout_s is not None and episode.position == len(episode.answers):
                limit_s = min(limit_s, max(0.0, config.episode_timeout_s - episode.seconds))
            start = call.begun_at or (float("inf") if waits else max(call.sent_at, self.heard_at))
            limits.append((episode, start + limit_s))
        return limits

    def deadline(self, config: EnvironmentConfig) -> float:
        """When the process has to be looked at: a call has run for half its limit (a sign of life is due) or a whole one, or
        the process has not started in time."""
        if not self.ready:
            return self.process.started_at + config.start_timeout_s
        half = config.step_timeout_s / 2
        due = (limit if one.running and one.running.asked else limit - half for one, limit in self.limits(config))
        return min(due, default=float("inf"))


def lateness(episode: OpenEpisode, config: EnvironmentConfig) -> tuple[str, str]:
    """(kind of failure, detail) of an episode whose call has exceeded its limit."""
    kind, limit = "timeout", f"environment.step_timeout_s={config.step_timeout_s:g}"
    whole = config.episode_timeout_s
    if whole is not None and episode.seconds + config.step_timeout_s > whole:
        kind, limit = "episode_timeout", f"environment.episode_timeout_s={whole:g}"
    return kind, f"{episode.calls[episode.position]['call']} (turn {episode.position}) exceeded {limit}"
