"""One environment process below a supervisor: starts it, sends it requests and reads its answers without blocking."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from aligner.environments.config import EnvironmentConfig
from aligner.reward.supervised_process import SUPERVISOR

WORKER = Path(__file__).with_name("worker.py")
ADAPTERS = Path(__file__).with_name("adapters")
LENGTH = struct.Struct(">I")
FRAME_LIMIT = 17 * 2**20
"""Largest answer, in bytes: more than `worker.FRAME_LIMIT`, so that only a process that breaks the protocol exceeds it."""
READ_BYTES = 1 << 18
END_S = 5.0
LOG_BYTES = 2000
MIB = 2**20
NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "PYTHONHOME",
)  # fmt: skip
"""Environment variables of the job's ranks that an environment does not get, beside all TORCHELASTIC_*."""


class ProtocolError(Exception):
    """The process sent something that is no message of the protocol."""


def interpreter(config: EnvironmentConfig) -> str:
    """The absolute path of environment.python (links are kept: a virtual environment's is one).

    Raises:
        ValueError: there is no such program.
    """
    if config.python is None:
        return sys.executable
    path = shutil.which(config.python)
    if path is None:
        raise ValueError(
            f"environment.python={config.python} is not a program; give a Python interpreter, such as that of a virtual "
            "environment, VENV/bin/python, or null for the job's own."
        )
    return os.path.abspath(path)


class EnvironmentProcess:
    """`worker.py` in an interpreter of its choice, with its supervisor: when this rank or the worker ends, however it ends,
    everything that the environment started is killed.

    It is started by exec, never forked from the rank, whose threads and devices a fork would not survive.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        """Start it; it is usable once it has sent {"ready"}. Raises OSError."""
        self.started_at = time.monotonic()
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="environment-log-")  # noqa: SIM115
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)  # the worker empties it when it has become long
        request_read, self.request_fd = os.pipe()
        self.answer_fd, answer_write = os.pipe()
        self._pid_fd, pid_write = os.pipe()
        inherited = (request_read, answer_write, pid_write)
        worker = [interpreter(config), str(WORKER), str(request_read), str(answer_write), str(ADAPTERS)]
        supervisor = [sys.executable, "-I", "-S", str(SUPERVISOR), str(pid_write), str(os.getpid())]
        try:
            self._supervisor = subprocess.Popen(
                supervisor + worker,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment(config),
                pass_fds=inherited,
            )
        except BaseException:
            for fd in (self.request_fd, self.answer_fd, self._pid_fd):
                os.close(fd)
            self._log.close()
            raise
        finally:
            for fd in inherited:
                os.close(fd)
        for fd in (self.request_fd, self.answer_fd):
            os.set_blocking(fd, False)
        self._outgoing, self._incoming = bytearray(), bytearray()
        self._pid: int | None = None
        self.ended = False
        self.send(_settings(config))

    @property
    def pid(self) -> int | None:
        """The worker's process id; None where it was never started. Waits a moment right after the start."""
        if self._pid is None and self._pid_fd >= 0:
            with open(self._pid_fd, "rb") as file:
                self._pid = int(file.read() or 0)
            self._pid_fd = -1
        return self._pid or None

    @property
    def writing(self) -> bool:
        """Whether requests wait for room in the pipe."""
        return bool(self._outgoing)

    @property
    def reading(self) -> bool:
        """Whether a part of an answer has arrived."""
        return bool(self._incoming)

    def send(self, request: Mapping[str, Any]) -> None:
        """Queue a request, and write what fits."""
        body = json.dumps(request, ensure_ascii=False).encode("utf-8", "replace")
        self._outgoing += LENGTH.pack(len(body)) + body
        self.write()

    def write(self) -> None:
        """Write what fits into the pipe."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self.request_fd, self._outgoing[:READ_BYTES])]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has ended, which `read` notices
            self._outgoing.clear()

    def read(self) -> list[dict[str, Any]]:
        """The answers that have arrived; sets `ended` at the end of its output.

        Raises:
            ProtocolError: what arrived is no message.
        """
        answers = []
        with contextlib.suppress(BlockingIOError):
            while not self.ended and len(self._incoming) < LENGTH.size + FRAME_LIMIT:
                piece = os.read(self.answer_fd, READ_BYTES)
                self.ended = not piece
                self._incoming += piece
        while len(self._incoming) >= LENGTH.size:
            size = LENGTH.unpack_from(self._incoming)[0]
            if size > FRAME_LIMIT:
                raise ProtocolError(f"it announces an answer of {size} bytes, more than {FRAME_LIMIT}")
            if len(self._incoming) < LENGTH.size + size:
                break
            body = bytes(self._incoming[LENGTH.size : LENGTH.size + size])
            del self._incoming[: LENGTH.size + size]
            answers.append(_parsed(body))
        return answers

    def thread_time_ns(self, native_id: int) -> int:
        """The CPU time of a thread of the worker, in nanoseconds; 0 where it has ended."""
        try:
            with open(f"/proc/{self.pid}/task/{native_id}/schedstat") as file:
                return int(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            return 0

    def log_tail(self, size_bytes: int = LOG_BYTES) -> str:
        """The end of what the environment has printed."""
        try:
            size = os.fstat(self._log.fileno()).st_size
            tail = os.pread(self._log.fileno(), size_bytes, max(0, size - size_bytes))
            return tail.decode("utf-8", "replace").strip()
        except (OSError, ValueError):
            return ""

    def kill(self) -> None:
        """Kill the worker, and with it, by the supervisor, all that it started; does not wait."""
        if self._supervisor.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if self.pid is not None:
                    os.kill(self.pid, signal.SIGKILL)
                else:
                    self._supervisor.kill()

    def wait(self) -> int:
        """Wait for its end after `kill` or `ended`; its exit code, the negative signal where one ended it. One that has closed its
        pipes and goes on is killed."""
        for end in (self.kill, self._supervisor.kill):
            try:
                return self._supervisor.wait(END_S)
            except subprocess.TimeoutExpired:
                end()
        return self._supervisor.wait()

    def close(self) -> int:
        """Kill it, wait and close the pipes; its exit code."""
        self.kill()
        code = self.wait()
        for fd in (self.request_fd, self.answer_fd, self._pid_fd):
            if fd >= 0:
                os.close(fd)
        self.request_fd = self.answer_fd = self._pid_fd = -1
        self._log.close()
        return code


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise ProtocolError("an answer is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ProtocolError("an answer is not JSON") from None
    if not isinstance(answer, dict):
        raise ProtocolError("an answer is not a JSON object")
    return answer


def _settings(config: EnvironmentConfig) -> dict[str, Any]:
    """What the worker is told first."""
    return {
        "kind": config.kind,
        "target": config.target,
        "options": dict(config.options),
        "tools": list(config.tools),
        "tool_options": dict(config.tool_options),
        "max_output_chars": config.max_output_chars,
        "long_output": config.long_output,
        "memory_bytes": None if config.memory_mib is None else config.memory_mib * MIB,
        "alone": config.episodes_per_process == 1,
    }


def _environment(config: EnvironmentConfig) -> dict[str, str]:
    """The environment variables of the process: the rank's without its place in the job, and no GPU."""
    foreign = config.python is not None
    left_out = {*NOT_INHERITED, *(("PYTHONPATH", "VIRTUAL_ENV") if foreign else ())}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and not name.startswith("TORCHELASTIC_")
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
