"""Run a program that nobody has read, as one that a language model wrote, so that it harms nothing outside."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ISOLATION = ("namespaces", "limits")
CONFINE = Path(__file__).with_name("confine.py")
MIB = 2**20
END_S = 5.0


class SandboxError(Exception):
    """The program could not be locked in, and was not run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """From its start to its end; each process also has this much CPU time, to the next second."""
    memory_mb: int = 1024
    """Address space of each process, in MiB."""
    processes: int = 16
    """Processes and threads at a time."""
    file_mb: int = 16
    """Largest file; with namespaces all files together are at most four times this."""
    output_kb: int = 1024
    """Bytes that it may print, on standard output and error together, in KiB."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    code: int
    """Exit code; minus the signal's number if one killed it."""
    stdout: bytes
    stderr: bytes
    stopped: str = ""
    """Why it was stopped from outside: `time`, `output` or nothing."""


def run_python(
    arguments: Sequence[str],
    files: Mapping[str, str],
    stdin: bytes = b"",
    limits: Limits | None = None,
    isolation: str = "namespaces",
    pass_fds: Sequence[int] = (),
) -> Outcome:
    """Run this machine's Python (`-I -S`: the standard library alone) on `arguments`, among `files`.

    Both ways of isolation give the program an empty environment, an empty folder of its own, no open file but standard
    input, output and error, limits on time, memory, files, processes and output, no core dump and no way to gain
    rights; it ends, with every process it has started, when it is over or its time is.

    namespaces (Linux 5.12; needs no root, only a kernel and container that allow user namespaces): it also has no
        network, sees no file but the system's and Python's own (read-only; not /etc, not the home folders, not the
        job's), sees and reaches no other process, and what it writes is in memory and gone afterwards. What it can
        still do: read /usr, look at the clock, use its limits up. Memory is limited for each process, so all together
        they may use memory_mb times processes; System V shared memory is limited only where root starts the sandbox. There is
        no filter of system calls: a fault in the kernel itself is a way out, as it is from any container.
    limits: for where namespaces are not allowed. The program CAN reach the network, read every file that this user can
        read (also /proc/*/environ, the environment of the user's other processes), write where this user can write, and
        signal the user's processes; a process that has left its group survives if this very process is killed. Run as
        root, it becomes nobody (65534), which leaves it little of that; run as a user, only for programs that are
        trusted not to try.

    Args:
        pass_fds: open files that it has besides, by the same numbers.

    Raises:
        SandboxError: it could not be locked in, with the reason.
    """
    limits = limits or Limits()
    deadline = time.monotonic() + limits.seconds
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        settings = {
            "parent": os.getpid(),
            "isolation": isolation,
            "folder": os.path.realpath(folder),
            "prefix": os.path.realpath(sys.base_prefix),
            "argv": [_interpreter(), "-I", "-S", "-B", "-X", "utf8", *arguments],
            "files": dict(files),
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_mb * MIB,
            "processes": limits.processes,
            "file_bytes": limits.file_mb * MIB,
            "box_bytes": 4 * limits.file_mb * MIB,
        }
        process, status = _start(settings, pass_fds)
        try:
            out, err, stopped = _talk(process, stdin, deadline, limits.output_kb * 1024)
        finally:
            _end(process)
            with open(status, "rb") as file:
                said = file.read().decode("utf-8", "replace").split("\n")[0]
    kind, _, rest = said.partition(" ")
    if kind == "setup:":
        raise SandboxError(rest)
    if not kind and not stopped:
        raise SandboxError(f"it ended without a word: {err[-200:].decode('utf-8', 'replace')}")
    code = int(rest) if kind == "exit" else -int(rest) if kind == "signal" else -signal.SIGKILL
    return Outcome(code, out, err, stopped)


@lru_cache(maxsize=2)
def isolation_problem(isolation: str) -> str | None:
    """Why programs cannot be run so here, if they cannot."""
    try:
        outcome = run_python(["-c", "print(6 * 7)"], {}, limits=Limits(seconds=20.0), isolation=isolation)
    except SandboxError as error:
        return str(error)
    if outcome.stdout.strip() != b"42":
        return f"a trial ended with {outcome.code}: {outcome.stderr[-200:].decode('utf-8', 'replace')}"
    return None


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _start(settings: Mapping[str, Any], pass_fds: Sequence[int]) -> tuple[subprocess.Popen[bytes], int]:
    """(the confining process with its three pipes, the file descriptor that its status comes on)."""
    given = os.memfd_create("settings")
    told, tell = os.pipe()
    try:
        os.write(given, b"")
        with open(given, "wb", closefd=False) as file:
            file.write(json.dumps(settings).encode())
        os.lseek(given, 0, os.SEEK_SET)
        process = subprocess.Popen(
            [_interpreter(), "-I", "-S", str(CONFINE), str(given), str(tell)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=(given, tell, *pass_fds),
            start_new_session=True,
        )
    except BaseException:
        os.close(told)
        raise
    finally:
        os.close(given)
        os.close(tell)
    return process, told


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the confining process to end all it has started and then itself; if it does not, kill what is known of it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _talk(process: subprocess.Popen[bytes], stdin: bytes, deadline: float, most: int) -> tuple[bytes, bytes, str]:
    """Feed it and read it until both outputs end, time is up or it has said too much."""
    assert process.stdin and process.stdout and process.stderr
    parts: dict[Any, list[bytes]] = {process.stdout: [], process.stderr: []}
    said, stopped = 0, ""
    with selectors.DefaultSelector() as selector, process.stdin, process.stdout, process.stderr:
        for pipe in (process.stdout, process.stderr):
            selector.register(pipe, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while not stopped and any(pipe in selector.get_map() for pipe in parts):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                stopped = "time"
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    stdin = _feed(process.stdin, stdin)
                    if not stdin:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, 65536)
                parts[key.fileobj].append(piece)
                said += len(piece)
                if not piece:
                    selector.unregister(key.fileobj)
                elif said > most:
                    stopped = "output"
    out, err = (b"".join(pieces) for pieces in parts.values())
    return out, err, stopped


def _feed(pipe: Any, text: bytes) -> bytes:
    """Write what fits; what is left. Nothing is, where nobody reads any more."""
    try:
        return text[os.write(pipe.fileno(), text[:65536]) :]
    except BrokenPipeError:
        return b""
