"""Agent programs: each in processes of its own below a supervisor, with limits, watched by one thread."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aligner.reward.supervised_process import SUPERVISOR

TICK_S, MEMORY_TICK_S = 0.2, 0.5
"""Seconds between two looks at time limits, and at the memory of all programs."""
MEMORY_PAUSE = 20
"""The second is at least this many times as long as a look takes."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MEMORY_SIGNS = ("MemoryError", "Cannot allocate memory", "heap out of memory")
"""How programs say at their end that they were refused memory."""


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may use."""

    start_s: float
    """Until its first request."""
    step_s: float
    """From an answer to its next request, or to its end."""
    total_s: float | None
    """All of that together, from its start to its end; None: no limit. None of the three counts the time that it waits for
    answers."""
    memory_bytes: int | None
    """Private memory of each of its processes, and resident memory of all together; None: no limit."""
    log_bytes: int
    """The last bytes of its standard output and of its standard error that are kept, each."""


@dataclass(frozen=True)
class Exited:
    """A program has ended, with all that it had started."""

    episode: int
    failure: str
    """"" for exit status 0; else "crashed", "timeout", "episode_timeout" or "memory"."""
    detail: str
    stdout: str
    stderr: str


class ProgramClock:
    """A program's own time: that in which it waits for no answer. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._open = 0
        self._total_s, self._since = 0.0, time.monotonic()

    def start(self) -> None:
        """The program starts now."""
        with self._lock:
            self._since = time.monotonic()

    def asked(self) -> None:
        """It waits for an answer."""
        with self._lock:
            if not self._open:
                self._total_s += time.monotonic() - self._since
            self._open += 1
            self._requests += 1

    def answered(self) -> None:
        """It has got one."""
        with self._lock:
            self._open -= 1
            if not self._open:
                self._since = time.monotonic()

    def overrun(self, limits: ProgramLimits) -> tuple[str, str] | None:
        """(kind of failure, detail) where it has taken longer than it may."""
        with self._lock:
            step_s = 0.0 if self._open else time.monotonic() - self._since
            if not self._requests and step_s > limits.start_s:
                return "timeout", f"no request within {limits.start_s:g} s (environment.start_timeout_s)"
            if self._requests and step_s > limits.step_s:
                return "timeout", f"no request and no end within {limits.step_s:g} s (environment.step_timeout_s)"
            if limits.total_s is not None and self._total_s + step_s > limits.total_s:
                return "episode_timeout", f"it took longer than {limits.total_s:g} s (environment.episode_timeout_s)"
        return None


@dataclass
class _Log:
    """The last bytes of a stream."""

    limit: int
    data: bytearray = field(default_factory=bytearray)

    def add(self, chunk: bytes) -> None:
        self.data += chunk
        del self.data[: -self.limit]

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class Launch:
    """A program to start."""

    episode: int
    clock: ProgramClock
    variables: Mapping[str, str]
    """Its whole environment."""
    files: Mapping[str, str]
    """Name -> text of files in its working folder, which is new, and is removed when it has ended."""


class _Program:
    """One program under way."""

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], pid: int, folder: str, log_bytes: int) -> None:
        self.episode, self.clock = launch.episode, launch.clock
        self.process, self.pid, self.folder = process, pid, folder
        assert process.stdout is not None and process.stderr is not None
        self.logs = {stream: _Log(log_bytes) for stream in (process.stdout, process.stderr)}
        self.failure, self.detail = "", ""
        """Why it was killed."""
        self.silent = False
        """Nobody waits for its end."""
        self._killed = False

    @property
    def silenced(self) -> bool:
        """Its output has been closed, so that its end is near."""
        return all(stream.closed for stream in self.logs)

    def kill(self, failure: str = "", detail: str = "") -> None:
        """End it with all that it has started: the supervisor does that when the program has ended."""
        if not self.failure:
            self.failure, self.detail = failure, detail
        if self._killed:  # its process id may be another's by now
            return
        self._killed = True
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def exited(self, code: int) -> Exited:
        """How it ended."""
        stdout, stderr = (log.text for log in self.logs.values())
        failure, detail = self.failure, self.detail
        if not failure and code:
            failure = "memory" if any(sign in stderr[-4000:] for sign in MEMORY_SIGNS) else "crashed"
            status = f"exit status {code}" if code > 0 else f"signal {-code}"
            detail = f"{status}: {stderr.strip()[-300:] or 'it wrote nothing to standard error'}"
        return Exited(self.episode, failure, detail, stdout, stderr)


class Programs:
    """Starts, watches and ends programs, in a thread of its own. `on_exit` is called there, once for each program."""

    def __init__(self, command: Sequence[str], limits: ProgramLimits, on_exit: Callable[[Exited], None]) -> None:
        self._command, self._limits, self._on_exit = list(command), limits, on_exit
        self._programs: dict[int, _Program] = {}
        self._to_start: list[Launch] = []
        self._to_end: set[int] = set()
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._watched, name="agent programs", daemon=True)
        self._thread.start()

    def start(self, launch: Launch) -> None:
        """Start the program for an episode; returns at once."""
        with self._lock:
            self._to_start.append(launch)
        self._wake()

    def end(self, episode: int) -> None:
        """Kill an episode's program, if it runs; `on_exit` is not called for it."""
        with self._lock:
            self._to_start = [launch for launch in self._to_start if launch.episode != episode]
            self._to_end.add(episode)
        self._wake()

    def close(self) -> None:
        """Kill all programs, and wait until they have ended. Idempotent."""
        self._closing = True
        if self._thread.is_alive():
            self._wake()
            self._thread.join()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wake(self) -> None:
        os.write(self._wake_write, b"w")

    def check(self) -> None:
        """Raises RuntimeError if the thread has failed: no program would ever end."""
        if self._failure is not None:
            raise RuntimeError("the thread that watches agent programs has failed") from self._failure

    def _watched(self) -> None:
        try:
            self._run()
        except Exception as error:
            self._failure = error

    def _run(self) -> None:
        next_memory_look = 0.0
        while not self._closing or self._programs:
            ending_now = self._closing or any(program.silenced for program in self._programs.values())
            self._read(0.01 if ending_now else TICK_S if self._programs else None)
            with self._lock:
                starting, self._to_start = self._to_start, []
                ending, self._to_end = self._to_end, set()
            for episode in self._programs.keys() if self._closing else ending:
                if episode in self._programs:
                    self._programs[episode].silent = True
                    self._programs[episode].kill()
            for launch in [] if self._closing else starting:
                self._start(launch)
            now = time.monotonic()
            if self._limits.memory_bytes is not None and now >= next_memory_look:
                self._check_memory(self._limits.memory_bytes)
                took_s = (
                    time.monotonic() - now
                )  # a large host has thousands of processes, and the rank needs Python's global lock
                next_memory_look = now + max(MEMORY_TICK_S, MEMORY_PAUSE * took_s)
            for program in list(self._programs.values()):
                if overrun := program.clock.overrun(self._limits):
                    program.kill(*overrun)
                self._reap(program)

    def _start(self, launch: Launch) -> None:
        folder = tempfile.mkdtemp(prefix="aligner-agent-")
        try:
            for name, text in launch.files.items():
                Path(folder, name).write_text(text, encoding="utf-8", errors="surrogatepass")
            process, pid = _supervised(self._command, launch.variables, folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._on_exit(Exited(launch.episode, "crashed", f"it could not be started: {error}", "", ""))
            return
        if self._limits.memory_bytes is not None:
            with contextlib.suppress(OSError):  # it has ended already
                resource.prlimit(pid, resource.RLIMIT_DATA, (self._limits.memory_bytes,) * 2)
        launch.clock.start()
        self._programs[launch.episode] = _Program(launch, process, pid, folder, self._limits.log_bytes)

    def _read(self, wait_s: float | None) -> None:
        """Take what programs have written; waits for the first of it, or for a call of `start`, `end` or `close`."""
        streams = {}
        for program in self._programs.values():
            streams.update(
                {stream.fileno(): (stream, log) for stream, log in program.logs.items() if not stream.closed}
            )
        poller = select.poll()
        for number in (self._wake_read, *streams):
            poller.register(number, select.POLLIN)
        for number, _ in poller.poll(None if wait_s is None else wait_s * 1000):
            chunk = os.read(number, 65536)
            if number != self._wake_read:
                stream, log = streams[number]
                log.add(chunk)
                if not chunk:
                    stream.close()

    def _reap(self, program: _Program) -> None:
        """Report a program that has ended, after all that it wrote was read."""
        code = program.process.poll()
        if code is None:
            return
        for stream, log in program.logs.items():
            if not stream.closed:
                os.set_blocking(stream.fileno(), False)
                with contextlib.suppress(BlockingIOError):
                    while chunk := os.read(stream.fileno(), 65536):
                        log.add(chunk)
                stream.close()
        del self._programs[program.episode]
        shutil.rmtree(program.folder, ignore_errors=True)
        if not program.silent:
            self._on_exit(program.exited(code))

    def _check_memory(self, limit: int) -> None:
        if not self._programs:
            return
        resident, children = _processes()
        for program in self._programs.values():
            pids = list(children.get(program.process.pid, ()))  # those of the supervisor, which gets orphans too
            for pid in pids:
                pids += children.get(pid, [])
            used = sum(resident.get(pid, 0) for pid in pids)
            if used > limit:
                program.kill("memory", f"its processes used {used >> 20} MiB, more than {limit >> 20}")


def _supervised(
    command: Sequence[str], variables: Mapping[str, str], folder: str
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command below a supervisor: (the supervisor, which ends last and as the command ends; the command's process id).

    Raises:
        OSError: it could not be started.
    """
    pid_read, pid_write = os.pipe()
    with open(pid_read, "rb") as file:
        try:
            supervisor = [sys.executable, "-I", "-S", str(SUPERVISOR), str(pid_write), str(os.getpid())]
            process = subprocess.Popen(
                [*supervisor, *command],
                env=dict(variables),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(pid_write,),
            )
        finally:
            os.close(pid_write)
        pid = file.read()
    if not pid:
        process.communicate()
        raise OSError("its supervisor could not start it")
    return process, int(pid)


def _processes() -> tuple[dict[int, int], dict[int, list[int]]]:
    """(resident bytes by process id, children by process id) of all processes."""
    resident: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(name))
            resident[int(name)] = int(fields[21]) * PAGE_BYTES
    return resident, children
