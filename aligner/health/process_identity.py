"""Identify a process by pid, start time and machine, and find out whether it is running, stopped or gone (no torch)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

GONE = "gone"
STOPPED = "stopped"
RUNNING = "here"


@dataclass(frozen=True)
class Process:
    """A process; its start time distinguishes it from a later process with the same pid."""

    pid: int
    started: int
    """Start time in clock ticks since boot; 0 without /proc."""

    def state(self) -> str:
        """GONE (ended, or a zombie), STOPPED (SIGSTOP, a debugger) or RUNNING."""
        stat = _stat(self.pid)
        if stat is None:
            return RUNNING if not self.started and _exists(self.pid) else GONE
        letter, started = stat
        if started != self.started or letter in "ZXx":
            return GONE
        return STOPPED if letter in "Tt" else RUNNING


def identify(pid: int | None = None) -> Process:
    """The process with this pid; by default the current one."""
    pid = os.getpid() if pid is None else pid
    stat = _stat(pid)
    return Process(pid, stat[1] if stat else 0)


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time) from /proc; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def machine_id() -> str:
    """Scope of process ids: host name, boot id and PID namespace."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return "/".join(parts)
