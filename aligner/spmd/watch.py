"""A thread per rank that ends the job when ranks leave lockstep or one of them fails; the reason reaches everybody.

Each rank publishes its journal's recent digests in the job's store, some 2 KB and only when there are new ones; rank 0
compares one digest of each rank, that of the last call which all have made. The first verdict, a disagreement or a
failed rank, is final: every rank reads it within `PERIOD` seconds and leaves.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np

from aligner.spmd.journal import Call, Journal
from aligner.spmd.store import own_store

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds that ranks get to say what they were doing."""


class Watch:
    """Runs beside the loop; never touches the process groups, only its own connection to the store."""

    def __init__(self, journal: Journal, rank: int, size: int, period: float = PERIOD) -> None:
        self.journal, self.rank, self.size, self.period = journal, rank, size, period
        self.store = own_store("watch")  # a blocking call of the main thread must not hold up the watch
        self._published, self._all_there = -1, False
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="aligner-watch", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread (a clean end of the job)."""
        self.stopped.set()
        self.thread.join(timeout=2 * self.period + GRACE)

    def fail(self, message: str) -> bool:
        """Publish this rank's failure. Returns whether it was the first verdict of the job."""
        verdict = json.dumps({"rank": self.rank, "message": message})
        try:
            return self.store.compare_set("verdict", "", verdict).decode() == verdict
        except RuntimeError:  # the store's host has left already
            return False

    def _run(self) -> None:
        try:
            while not self.stopped.wait(self.period):
                self._publish()
                if self.rank == 0:
                    self._judge()
                if self.store.check(["verdict"]):
                    self._leave(json.loads(self.store.get("verdict")))
        except (RuntimeError, ConnectionError) as error:  # store gone: the launcher is ending the job
            if not self.stopped.is_set():
                sys.stderr.write(f"aligner: rank {self.rank} lost the job's store ({error}); leaving.\n")
                sys.stderr.flush()
                os._exit(1)

    def _publish(self) -> None:
        calls = list(self.journal.calls)
        if calls[-1].number > self._published:
            self.store.set(f"calls/{self.rank}", as_bytes(calls))  # type: ignore[arg-type]  # bytes are taken too
            self._published = calls[-1].number

    def _judge(self) -> None:
        """Rank 0: find the first call in which two ranks' histories differ."""
        keys = [f"calls/{rank}" for rank in range(self.size)]
        self._all_there = self._all_there or self.store.check(keys)
        if not self._all_there:
            return
        published = self.store.multi_get(keys)
        if agree(published):
            return
        number = first_difference([from_bytes(raw) for raw in published])
        if number is not None:
            self.store.compare_set("verdict", "", json.dumps({"number": number}))

    def _leave(self, verdict: dict) -> None:
        if "number" not in verdict:
            self._leave_failed(verdict)
        number = verdict["number"]
        here = self.journal.at(number)
        now = self.journal.calls[-1]
        self.store.set(f"said/{self.rank}", json.dumps([str(here) if here else "", str(now)]))
        if self.rank == 0:
            sys.stderr.write(self._report(number) + "\n")
            sys.stderr.flush()
            self.store.set("reported", "1")
        else:
            _wait_until(lambda: self.store.check(["reported"]), 2 * GRACE)
        os._exit(1)

    def _leave_failed(self, verdict: dict) -> None:
        if verdict["rank"] == self.rank:
            time.sleep(GRACE)  # the main thread prints and leaves by itself
        else:
            sys.stderr.write(f"aligner: rank {self.rank} leaves because rank {verdict['rank']} failed.\n")
            sys.stderr.flush()
        os._exit(1)

    def _report(self, number: int) -> str:
        _wait_until(lambda: self.store.check([f"said/{r}" for r in range(self.size)]), GRACE)
        said: dict[str, list[int]] = {}
        for rank in range(self.size):
            key = f"said/{rank}"
            there, now = json.loads(self.store.get(key)) if self.store.check([key]) else ("", "unknown")
            said.setdefault(there or f"nothing yet; last {now}", []).append(rank)
        lines = [f"  rank(s) {', '.join(map(str, ranks))}: {what}" for what, ranks in said.items()]
        return (
            f"aligner: error: ranks are not in lockstep since role call {number}:\n" + "\n".join(lines) + "\n"
            "Every rank must issue the same role calls; look for a branch on a value that differs between ranks "
            "(bring it to every rank with ref.get() first)."
        )


def as_bytes(calls: Iterable[Call]) -> bytes:
    """Consecutive calls: the last one's number (int64), then every digest (uint32), the last one's first."""
    newest_first = list(calls)[::-1]
    digests = np.array([call.digest for call in newest_first], np.uint32)
    return np.int64(newest_first[0].number).tobytes() + digests.tobytes()


def from_bytes(raw: bytes) -> dict[int, int]:
    """{number: digest}."""
    last = int(np.frombuffer(raw, np.int64, 1)[0])
    return {last - back: digest for back, digest in enumerate(np.frombuffer(raw, np.uint32, offset=8).tolist())}


def agree(published: Sequence[bytes]) -> bool:
    """Whether all ranks have one digest at the last call that every rank has made; it covers all calls before it."""
    last = [int.from_bytes(raw[:8], "little") for raw in published]
    common = min(last)
    places = [8 + 4 * (number - common) for number in last]  # beyond the end: a rank that no longer knows
    return len({raw[place : place + 4] for raw, place in zip(published, places, strict=True)} - {b""}) <= 1


def first_difference(histories: list[dict[int, int]]) -> int | None:
    """Lowest call number at which two ranks' digests differ, or None. Histories: {number: digest} per rank."""
    seen: dict[int, int] = {}
    wrong = [n for history in histories for n, digest in history.items() if seen.setdefault(n, digest) != digest]
    return min(wrong, default=None)


def _wait_until(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)
