"""Run an untrusted Python program, such as one written by a language model, in a sandbox."""

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
    """The sandbox could not be set up; the program was not run."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program."""

    seconds: float = 5.0
    """Wall-clock limit; each process also has this much CPU time, rounded up to a second."""
    memory_mb: int = 1024
    """Address space of each process, in MiB."""
    processes: int = 16
    """Concurrent processes and threads."""
    file_mb: int = 16
    """Largest file, in MiB; with namespaces all files together are limited to four times this."""
    output_kb: int = 1024
    """Standard output and error together, in KiB."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    code: int
    """Exit code; the negative signal number if it was killed."""
    stdout: bytes
    stderr: bytes
    stopped: str = ""
    """Limit for which it was stopped: `time`, `output` or ""."""


def run_python(
    arguments: Sequence[str],
    files: Mapping[str, str],
    stdin: bytes = b"",
    limits: Limits | None = None,
    isolation: str = "namespaces",
    pass_fds: Sequence[int] = (),
) -> Outcome:
    """Run this machine's Python (`-I -S`: standard library only) with `arguments` in a folder with `files`.

    With both kinds of isolation the program has an empty environment, a folder of its own, no open files but standard
    input, output and error, limits on time, memory, files, processes and output, no core dumps and no way to gain
    privileges; it is killed with all its descendants when it ends or its time is up.

    namespaces (Linux 5.12; needs no root, only a kernel and container that allow user namespaces): it also has no
        network, sees only system files and Python's own (read-only; not /etc, home folders or the job's files), sees no
        other processes, and writes only to memory that is discarded. It can still read /usr, read the clock, and use up
        its limits. Memory is limited per process, so in total memory_mb times processes; System V shared memory is
        limited only if root starts the sandbox. System calls are not filtered: a kernel vulnerability is a way out, as
        from any container.
    limits: for systems without namespaces. The program CAN use the network, read all files that this user can read (also
        /proc/*/environ of the user's other processes), write where this user can write, and signal the user's processes;
        a process that has left its group survives if this process is killed. Started as root it becomes nobody (65534),
        which leaves it little of that; started as a user, use it only for trusted programs.

    Args:
        arguments: of the Python interpreter, such as a file name.
        files: name -> text, written (read-only) into the program's folder.
        pass_fds: further open file descriptors that it inherits, by the same numbers.

    Raises:
        SandboxError: the sandbox could not be set up.
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
                status_line = file.read().decode("utf-8", "replace").split("\n")[0]
    kind, _, rest = status_line.partition(" ")
    if kind == "setup:":
        raise SandboxError(rest)
    if not kind and not stopped:
        raise SandboxError(f"it ended without a status: {err[-200:].decode('utf-8', 'replace')}")
    code = int(rest) if kind == "exit" else -int(rest) if kind == "signal" else -signal.SIGKILL
    return Outcome(code, out, err, stopped)


@lru_cache(maxsize=2)
def isolation_problem(isolation: str) -> str | None:
    """Why this kind of isolation does not work on this machine, or None; runs a trial program."""
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
    """(the launcher process `confine.py` with its three pipes, the file descriptor of its status)."""
    settings_fd = os.memfd_create("settings")
    status_read, status_write = os.pipe()
    try:
        os.write(settings_fd, b"")
        with open(settings_fd, "wb", closefd=False) as file:
            file.write(json.dumps(settings).encode())
        os.lseek(settings_fd, 0, os.SEEK_SET)
        process = subprocess.Popen(
            [_interpreter(), "-I", "-S", str(CONFINE), str(settings_fd), str(status_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=(settings_fd, status_write, *pass_fds),
            start_new_session=True,
        )
    except BaseException:
        os.close(status_read)
        raise
    finally:
        os.close(settings_fd)
        os.close(status_write)
    return process, status_read


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the launcher process to end its descendants and itself; kill its group if it does not."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _talk(process: subprocess.Popen[bytes], stdin: bytes, deadline: float, limit: int) -> tuple[bytes, bytes, str]:
    """Feed standard input and read the outputs until both end, time is up or the output limit is exceeded."""
    assert process.stdin and process.stdout and process.stderr
    parts: dict[Any, list[bytes]] = {process.stdout: [], process.stderr: []}
    output_bytes, stopped = 0, ""
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
                output_bytes += len(piece)
                if not piece:
                    selector.unregister(key.fileobj)
                elif output_bytes > limit:
                    stopped = "output"
    out, err = (b"".join(pieces) for pieces in parts.values())
    return out, err, stopped


def _feed(pipe: Any, text: bytes) -> bytes:
    """Write what fits and return the rest; b"" if the reader has closed the pipe."""
    try:
        return text[os.write(pipe.fileno(), text[:65536]) :]
    except BrokenPipeError:
        return b""
