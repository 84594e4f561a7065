"""Which of several calls in a process is at fault when the process ends or stands still."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from aligner.environments.process import EnvironmentProcess

CRASHED_THREAD = re.compile(r"^Current thread (0x[0-9a-f]+)", re.MULTILINE)
"""What faulthandler writes before the traceback of the thread that crashed."""
CRASH_LOG_BYTES = 2**20
"""The end of the log in which it is looked for: the tracebacks of other threads and the names of all extension modules follow it."""


@dataclass
class Call:
    """A call that a process was asked for and has not answered."""

    id: int
    episode: int
    sent_at: float
    """time.monotonic() seconds."""
    begun_at: float | None = None
    """When it began to run; None while it waits for others."""
    asked: bool = False
    """Its process was asked for a sign of life because this call takes long."""
    thread: tuple[int, ...] = ()
    """(Python's identifier, the system's, nanoseconds of CPU time before the call) of the thread that it runs in."""


def crash_suspects(calls: Sequence[Call], log: str) -> list[Call]:
    """Calls one of which may have ended the process: the one whose thread Python's faulthandler has named, else all that ran."""
    begun = [call for call in calls if call.begun_at is not None]
    crashed = [int(ident, 16) for ident in CRASHED_THREAD.findall(log)]
    named = [call for call in begun if call.thread and call.thread[0] in crashed]
    return named if len(named) == 1 else begun


def stall_suspects(calls: Sequence[Call], process: EnvironmentProcess) -> list[Call]:
    """Calls one of which keeps Python's global lock: the one that has computed for longer than all others together, which wait
    for the lock; else all that run."""
    begun = [call for call in calls if call.begun_at is not None]
    computed = {
        call.id: process.thread_time_ns(call.thread[1]) - call.thread[2] for call in begun if len(call.thread) == 3
    }
    most = max(begun, key=lambda call: computed.get(call.id, 0), default=None)
    return [most] if most is not None and 2 * computed.get(most.id, 0) > sum(computed.values()) > 0 else begun
