"""Which process on which machine: a number and when it started, whether it is there, stopped or gone (no torch)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

GONE = "gone"
STOPPED = "stopped"
HERE = "here"


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same number by when it started."""

    pid: int
    started: int
    """Clock ticks after the host's start; 0 without /proc."""

    def state(self) -> str:
        """GONE (ended, or a zombie), STOPPED (SIGSTOP, a debugger) or HERE."""
        found = _stat(self.pid)
        if found is None:
            return HERE if not self.started and _answers(self.pid) else GONE
        letter, started = found
        if started != self.started or letter in "ZXx":
            return GONE
        return STOPPED if letter in "Tt" else HERE


def process(pid: int | None = None) -> Process:
    """The process of this number; by default this one."""
    pid = os.getpid() if pid is None else pid
    found = _stat(pid)
    return Process(pid, found[1] if found else 0)


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time) of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def machine() -> str:
    """Where process numbers mean the same: this host since its start, and this container on it."""
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
