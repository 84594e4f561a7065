"""Heartbeats: their format, and detection of silent and hanging ranks from those of all ranks (pure; the observer's clock)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aligner.health.activity import Activity
from aligner.health.config import HangConfig
from aligner.health.journal import Journal

COUNT, PROGRESS, CALL, WAITS, IN_LOOP = range(5)
"""Columns of a heartbeat, int64: number of heartbeats, progress counter, number of the role call, whether the rank waits for
others, whether the training loop is running."""
BYTES = 40
Verdict = dict[str, Any]
"""kind: silent, hang, dead, stopped, lockstep or failed; ranks: those responsible; further keys by kind (seconds, number,
message)."""


def beat_of(count: int, activity: Activity, journal: Journal) -> bytes:
    """This rank's next heartbeat."""
    number = journal.calls[-1].number
    waits = activity.current.kind == "wait"
    return np.array([count, activity.progress + number, number, waits, activity.in_loop], np.int64).tobytes()


class Heartbeats:
    """The last heartbeats of `ranks`, and when each changed."""

    def __init__(self, ranks: Sequence[int], config: HangConfig) -> None:
        self.ranks, self.config = np.array(ranks), config
        self._beats_R5 = np.full((len(ranks), 5), -1, np.int64)
        self._seen_R = np.zeros(len(ranks))
        self._moved_R = np.zeros(len(ranks))
        self._last = -np.inf

    def check(self, beats: Sequence[bytes], now: float) -> Verdict | None:
        """The verdict on silent or hanging ranks, or None.

        Args:
            beats: of `ranks`, in order. now: seconds of any monotonic clock.
        """
        beats_R5 = np.frombuffer(b"".join(beats), np.int64).reshape(-1, 5)
        if now - self._last > self.config.dead_seconds / 2:  # the first call, or this rank itself was suspended
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
        """bool [R]: ranks responsible for a hang.

        Not those that wait for others, unless all ranks are stuck; nor those inside a role call in which another member
        makes progress, because they may wait in a collective of an engine.
        """
        config, beats_R5 = self.config, self._beats_R5
        limit_R = np.where(beats_R5[:, IN_LOOP] == 1, config.after_seconds, config.setup_seconds)
        stuck_R = now - self._moved_R > limit_R
        waits_R = beats_R5[:, WAITS] == 1
        alive_calls = beats_R5[~stuck_R & ~waits_R, CALL]
        responsible_R = stuck_R & ~waits_R & ~np.isin(beats_R5[:, CALL], alive_calls)
        if not responsible_R.any() and stuck_R.all():  # all wait: blame those that are behind
            return np.asarray(beats_R5[:, CALL] == beats_R5[:, CALL].min())
        return np.asarray(responsible_R)

    def _verdict(self, kind: str, of_R: np.ndarray, seconds: float) -> Verdict:
        return {"kind": kind, "ranks": self.ranks[of_R].tolist(), "seconds": float(seconds)}
