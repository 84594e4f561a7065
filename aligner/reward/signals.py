"""Keep external signals from killing reward workers: schedulers signal all processes of a job, but only ranks must react.

A worker killed by one would fail its row and so change the step that is checkpointed; without multiprocessing's resource
tracker ranks would end with a traceback per semaphore.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

IGNORED_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals ignored by workers: those that Slurm sends before a time limit or at cancellation, users, and terminals."""


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that this thread starts inside have the signals blocked, until they have installed handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_tracker() -> None:
    """Start multiprocessing's resource tracker with the signals blocked; by itself it only ignores SIGINT and SIGTERM."""
    with signals_blocked():
        resource_tracker.ensure_running()


class SignalCounter:
    """Counts the signals in a worker instead of dying of them.

    Handlers are used rather than SIG_IGN, so that programs started by a rule have the default dispositions.
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of signals received."""
        os.register_at_fork(after_in_child=_defaults)
        for number in IGNORED_SIGNALS:
            signal.signal(number, self._count)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)  # see signals_blocked

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _defaults() -> None:
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
