"""What the server's threads and the rollout's thread hand to each other: requests one way, answers the other."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from aligner.environments.endpoint.errors import ApiError
from aligner.environments.endpoint.programs import Exited, ProgramClock
from aligner.environments.endpoint.requests import ModelRequest, RewardReport
from aligner.environments.endpoint.responses import Reply


@dataclass
class Session:
    """One episode, as the server knows it: by its key, which is the program's OPENAI_API_KEY."""

    episode: int
    key: str
    clock: ProgramClock = field(default_factory=ProgramClock)
    report: RewardReport | None = None
    """The last POST /v1/reward."""


@dataclass
class Pending:
    """A request whose answer a thread of the server waits for."""

    session: Session
    request: ModelRequest
    retry: bool = False
    """The client says that it has sent the request before."""
    connected: Callable[[], bool] = lambda: True
    """Whether the client still waits."""
    _done: threading.Event = field(default_factory=threading.Event)
    _answer: Reply | ApiError | None = None

    def finish(self, answer: Reply | ApiError) -> None:
        """Give the answer, or the reason why there is none; the first one counts."""
        if self._answer is None:
            self._answer = answer
            self._done.set()

    def wait(self) -> Reply:
        """The answer. Raises the ApiError that was given in its place."""
        self.session.clock.asked()
        self._done.wait()
        self.session.clock.answered()
        assert self._answer is not None
        if isinstance(self._answer, ApiError):
            raise self._answer
        return self._answer


class Exchange:
    """Sessions by key, and the inbox of the rollout's thread. Thread-safe."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._inbox: deque[Pending | Exited] = deque()
        self._ready = threading.Condition()

    def open(self, episode: int) -> Session:
        """A session with a key of its own."""
        session = Session(episode, f"aligner-{secrets.token_urlsafe(32)}")
        with self._ready:
            self._sessions[_hashed(session.key)] = session
        return session

    def forget(self, session: Session) -> None:
        """Its key is unknown from now on."""
        with self._ready:
            self._sessions.pop(_hashed(session.key), None)

    def session(self, key: str) -> Session:
        """The open session of a key. Raises ApiError 401."""
        session = self._sessions.get(_hashed(key))
        if session is None:
            raise ApiError(
                401,
                "This key belongs to no episode that is under way; send the OPENAI_API_KEY of the program.",
                code="invalid_api_key",
            )
        return session

    def put(self, event: Pending | Exited) -> None:
        """Hand something to the rollout's thread."""
        with self._ready:
            self._inbox.append(event)
            self._ready.notify()

    def drain(self, wait_s: float) -> list[Pending | Exited]:
        """All that has come; waits at most `wait_s` seconds for the first of it."""
        deadline = time.monotonic() + wait_s
        with self._ready:
            while not self._inbox and (left := deadline - time.monotonic()) > 0:
                self._ready.wait(left)
            events = list(self._inbox)
            self._inbox.clear()
        return events


def _hashed(key: str) -> bytes:
    """Keys are compared by their digests, so that the time of a comparison says nothing about a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
