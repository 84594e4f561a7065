"""Heartbeats of all ranks as one rank sees them, and what they say: pure, by the looker's own clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aligner.health.activity import Activity
from aligner.health.config import HangConfig
from aligner.health.journal import Journal

COUNT, PROGRESS, CALL, WAITS, IN_LOOP = range(5)
"""Columns of a beat, int64: heartbeats so far, things done, number of the role call, whether the rank waits for others,
whether the loop's steps are under way."""
BYTES = 40
Verdict = dict[str, Any]
"""kind: silent, hang, dead, stopped, lockstep or failed; ranks: whom it names; and what it takes to tell it."""


def beat_of(count: int, activity: Activity, journal: Journal) -> bytes:
    """This rank's next beat."""
    number = journal.calls[-1].number
    waits = activity.now.kind == "wait"
    return np.array([count, activity.progress + number, number, waits, activity.in_loop], np.int64).tobytes()


class Heartbeats:
    """The last beats of `ranks`, and when each changed."""

    def __init__(self, ranks: Sequence[int], config: HangConfig) -> None:
        self.ranks, self.config = np.array(ranks), config
        self._beats_R5 = np.full((len(ranks), 5), -1, np.int64)
        self._seen_R = np.zeros(len(ranks))
        self._moved_R = np.zeros(len(ranks))
        self._last = -np.inf

    def look(self, beats: Sequence[bytes], now: float) -> Verdict | None:
        """What is wrong, if anything. `beats`: of `ranks`, in their order; `now`: seconds of any clock."""
        beats_R5 = np.frombuffer(b"".join(beats), np.int64).reshape(-1, 5)
        if now - self._last > self.config.dead_seconds / 2:  # the first look, or it was this rank that slept
            self._seen_R[:], self._moved_R[:] = now, now
        self._last = now
        self._seen_R[beats_R5[:, COUNT] != self._beats_R5[:, COUNT]] = now
        self._moved_R[beats_R5[:, PROGRESS] != self._beats_R5[:, PROGRESS]] = now
        self._beats_R5 = beats_R5
        silent_R = now - self._seen_R > self.config.dead_seconds
        if silent_R.any():
            return self._verdict("silent", silent_R, (now - self._seen_R)[silent_R].min())
        stuck_R = self._stuck(now)
        if stuck_R.any():
            return self._verdict("hang", stuck_R, (now - self._moved_R)[stuck_R].min())
        return None

    def _stuck(self, now: float) -> np.ndarray:
        """Ranks to blame for standing still.

        One that waits for others is not, unless everybody stands; nor is one inside a role call in which another member
        is still getting on: it may wait in a collective of an engine.
        """
        config, beats_R5 = self.config, self._beats_R5
        limit_R = np.where(beats_R5[:, IN_LOOP] == 1, config.after_seconds, config.setup_seconds)
        still_R = now - self._moved_R > limit_R
        waits_R = beats_R5[:, WAITS] == 1
        alive_calls = beats_R5[~still_R & ~waits_R, CALL]
        blamed_R = still_R & ~waits_R & ~np.isin(beats_R5[:, CALL], alive_calls)
        if not blamed_R.any() and still_R.all():  # all wait: for those who are behind
            return np.asarray(beats_R5[:, CALL] == beats_R5[:, CALL].min())
        return np.asarray(blamed_R)

    def _verdict(self, kind: str, of_R: np.ndarray, seconds: float) -> Verdict:
        return {"kind": kind, "ranks": self.ranks[of_R].tolist(), "seconds": float(seconds)}
