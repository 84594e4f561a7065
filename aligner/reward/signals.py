"""Signals from outside: schedulers send them to every process of a job, and only the ranks are meant to answer.

A worker that died of one would fail its row, and so change the step that is saved; without multiprocessing's resource tracker, ranks
end with a traceback for each semaphore.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

OUTLIVED = frozenset({signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""What Slurm sends before a time limit or at a cancellation, what users send, and what a terminal sends."""


@contextmanager
def held_back() -> Iterator[None]:
    """Processes that this thread starts inside are born with the signals blocked: they cannot die of one before they are ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLIVED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_tracker() -> None:
    """multiprocessing's resource tracker, which by itself outlives only SIGINT and SIGTERM; it ends with the last of its users."""
    with held_back():
        resource_tracker.ensure_running()


class Outlived:
    """In a worker, from its first line on: the signals are noted, and do nothing else.

    By handlers, not by SIG_IGN, so that programs that a rule starts get the defaults back, as everywhere; those may die of the signal.
    """

    def __init__(self) -> None:
        self.count = 0
        """How many have come."""
        os.register_at_fork(after_in_child=_defaults)
        for number in OUTLIVED:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTLIVED)  # see held_back

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _defaults() -> None:
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_DFL)
