"""A fork server for Python programs: it imports torch, Megatron, vLLM and transformers once (7 to 10 s), then forks.

`Popen` and `run` are subprocess's own, with another way to start `python PROGRAM`: a helper process, which has imported the
libraries and has no threads, forks twice, and the program becomes a child of the caller (who is the helper's subreaper). It
is as one that was executed: its own argv, environment, working folder, sys.path, `__main__`, random states, signals, open
files, parent and exit status, and it ends as the interpreter ends. torchrun is started so too; its agent is its own, and
its ranks are forked, as its children.

Two things differ. Programs share the helper's hash seed of strings. And what libraries read from the environment while they
are imported is the helper's, so a program that wants another value there is executed; so is everything else that cannot be
forked, and, with ALIGNER_TESTS_FORK=0, everything.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import pkgutil
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "torch.distributed.run",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.compilation.backends",
    "compressed_tensors.compressors.model_compressors.model_compressor",
    "hydra.compose",
    "hydra._internal.core_plugins.basic_sweeper",
    "antlr4",
    "pebble",
    "aligner.reward.role",
    "wandb",
)
"""Besides all of aligner: what its jobs import, and much of what vLLM imports when an engine starts."""
NOT_PRELOADED = ("aligner.main", "aligner.launcher", "aligner.reward", "aligner.reshard.message.kernels_triton")
"""What is run as a program, or is for a device."""
LAUNCHERS = ("torch.distributed.run", "aligner.launcher")
"""Modules that start ranks."""
AT_IMPORT = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH_", "PYTORCH_", "TRITON_", "VLLM_", "HF_", "HUGGINGFACE_",
             "TRANSFORMERS_", "TOKENIZERS_", "CUDA_", "PYTHON", "LD_", "MALLOC_", "LC_", "LANG", "XDG_CACHE_HOME")  # fmt: skip
"""How the names of variables begin that are read by the interpreter or by libraries that are being imported ..."""
NOT_AT_IMPORT = ("PYTHONPATH", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_")
"""... and of those that begin so and are read later."""
DEFAULTS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FATAL = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Libraries of vLLM's take these when they are imported, and print for seconds."""
PR_SET_CHILD_SUBREAPER = 36


class _Helper:
    """The caller's end of a helper process."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.connection, self.owner, self._process = connection, os.getpid(), process
        self._lock, self._prctl, self.broken = threading.Lock(), ctypes.CDLL(None).prctl, False

    def start(self, request: dict[str, Any], files: Sequence[int]) -> int | None:
        """The pid of a new child of this process, or None where the program must be executed."""
        with self._lock:
            self._prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                _send(self.connection, request, files)
                reply = _receive(self.connection)[0]
            except BaseException as error:  # also a test's time limit: the answer to come would be taken for another's
                self.broken = True
                self.connection.close()
                if isinstance(error, (EOFError, OSError)):
                    raise RuntimeError("the fork server has ended; see its errors above") from error
                raise
            finally:
                self._prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return reply

    def close(self) -> None:
        """End it; the programs stay."""
        self.connection.close()
        if self._process is not None and os.getpid() == self.owner:
            self._process.wait()


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """subprocess.Popen, which forks what it can; its environment has DEFAULTS where it does not say otherwise."""

    def _execute_child(  # type: ignore[no-untyped-def]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
        p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ):  # fmt: skip
        pid = None
        env = {**DEFAULTS, **(os.environ if env is None else env)}
        special = (executable, preexec_fn, gid, gids, uid) != (None,) * 5 or umask >= 0 or process_group >= 0
        if not (special or shell or pass_fds or isinstance(args, (str, bytes, os.PathLike))):
            command = [os.fspath(item) for item in args]
            pid = _fork(command, env, cwd, start_new_session, (p2cread, c2pwrite, errwrite))
        if pid is None:
            return super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
                p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session,
                process_group,
            )  # fmt: skip
        self.pid, self._child_created = pid, True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        return None


def run(
    command: Sequence[Any],
    *,
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """subprocess.run with `Popen`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done


_helper: _Helper | None = None
_starting = threading.Lock()


def _fork(command: list[str], env: Mapping[str, str], cwd: Any, session: bool, files: Sequence[int]) -> int | None:
    global _helper
    if _program(command) is None or os.environ.get("ALIGNER_TESTS_FORK") == "0":
        return None
    with _starting:
        if _helper is None or _helper.broken or _helper.owner != os.getpid():
            _helper = _start_helper()
            atexit.register(_helper.close)
    request = {
        "command": command,
        "env": dict(env),
        "cwd": os.fspath(cwd or os.getcwd()),
        "session": session,
    }
    return _helper.start(request, [number if file == -1 else file for number, file in enumerate(files)])


def _start_helper() -> _Helper:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            env={**DEFAULTS, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return _Helper(ours, process)


def _send(connection: socket.socket, message: Any, files: Sequence[int] = ()) -> None:
    body = json.dumps(message).encode()
    socket.send_fds(connection, [len(body).to_bytes(8, "big")], files)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message and its open files.

    Raises:
        EOFError: the other side has ended.
    """
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    body = b""
    while head and len(body) < int.from_bytes(head, "big"):
        body += (more := connection.recv(1 << 20))
        if not more:
            break
    if not head or len(body) < int.from_bytes(head, "big"):
        raise EOFError
    return json.loads(body), files


def _program(command: list[str]) -> list[str] | None:
    """What follows `python -u`: a script, -m MODULE or -c CODE, and arguments; None for anything else."""
    if os.path.realpath(command[0]) != os.path.realpath(sys.executable):
        return None
    program = command[2:] if command[1:2] == ["-u"] else command[1:]
    if not program or (program[0].startswith("-") and (program[0] not in ("-m", "-c") or len(program) < 2)):
        return None
    return program


# What follows runs in the helper and in the programs.


def _can_fork(request: dict[str, Any], imported_with: Mapping[str, set[str | None]]) -> bool:
    """imported_with: name -> its value before the imports and after them (a caller that has imported them too has that one)."""
    environment, cwd = request["env"], request["cwd"]
    if _program(request["command"]) is None:
        return False
    for name in environment.keys() | imported_with.keys():
        read_at_import = name.startswith(AT_IMPORT) and not name.startswith(NOT_AT_IMPORT)
        if read_at_import and environment.get(name) not in imported_with.get(name, {None}):
            return False
    for folder in [cwd, *environment.get("PYTHONPATH", "").split(os.pathsep)]:
        path = Path(cwd, folder).resolve()
        if (path / "sitecustomize.py").exists() or (path != ROOT and (path / "aligner").exists()):
            return False  # other modules than those that have been imported
    return True


def _serve(connection: socket.socket, imported_with: Mapping[str, set[str | None]], path: list[str]) -> None:
    """Fork what the parent of this process asks for; returns only in a forked program, when that has ended."""
    parent = os.getppid()
    while True:
        try:
            request, files = _receive(connection)
        except (EOFError, OSError):
            os._exit(0)
        pid = 0
        if _can_fork(request, imported_with):
            begin, end = os.pipe()
            if (between := os.fork()) == 0:
                if pid := os.fork():
                    os.write(end, pid.to_bytes(8, "big"))
                    os._exit(0)
                connection.close()
                os.close(begin)
                os.close(end)
                while os.getppid() != parent:  # until the process between has ended
                    time.sleep(0.0005)
                return _become(request, files, imported_with, path)
            os.waitpid(between, 0)
            pid = int.from_bytes(os.read(begin, 8), "big")
            os.close(begin)
            os.close(end)
        for file in files:
            os.close(file)
        _send(connection, pid or None)


def _become(
    request: dict[str, Any], files: list[int], imported_with: Mapping[str, set[str | None]], path: list[str]
) -> None:
    """Be the program; returns or raises where it ends."""
    if request["session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    cwd = request["cwd"]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(request["env"])
    for number in FATAL:
        signal.signal(number, signal.SIG_DFL)
    tempfile.tempdir = None
    random.seed()
    sys.modules["numpy"].random.seed()
    program = _program(request["command"])
    assert program is not None
    kind, *arguments = program if program[0] in ("-m", "-c") else ["", *program]
    given = [os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    head = {"-m": cwd, "-c": "", "": os.path.dirname(os.path.realpath(arguments[0]))}[kind]
    sys.path[:] = [head, *dict.fromkeys([*given, *path])]
    importlib.invalidate_caches()
    sys.argv[:] = [kind, *arguments[1:]] if kind else arguments
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    if kind == "-m":
        if arguments[0] in LAUNCHERS:
            forked = _fork_ranks(imported_with, path)
            if forked:
                return
        sys.modules.pop(arguments[0], None)
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
        return
    if not kind:
        main.__dict__["__file__"] = arguments[0]
    source = arguments[0] if kind else Path(arguments[0]).read_bytes()
    exec(compile(source, arguments[0] if not kind else "<string>", "exec"), main.__dict__)


def _fork_ranks(imported_with: Mapping[str, set[str | None]], path: list[str]) -> bool:
    """In a launcher, before it has threads: it will have its ranks forked by a helper of its own.

    Returns:
        True in a rank, when its program has ended.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    global _helper
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        os.setpgid(0, 0)  # what is sent to the launcher's group is not for this process
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        _serve(theirs, imported_with, path)
        return True
    theirs.close()
    _helper = _Helper(ours)
    subprocess_handler.Popen = Popen
    return False


def _main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    before, path = dict(os.environ), [folder for folder in sys.path[1:] if folder != str(ROOT)]
    interrupt, show = signal.signal(signal.SIGINT, signal.SIG_IGN), warnings.showwarning  # Ctrl-C is for the caller
    warnings.showwarning = lambda *_, **__: None
    gc.disable()  # as `aligner.main` does: what is imported stays
    import aligner

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # as a rank does before it imports vLLM ...
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # ... which speaks before it reads that
    ours = [module.name for module in pkgutil.walk_packages(aligner.__path__, "aligner.")]
    for name in [*PRELOADED, *(name for name in ours if not name.startswith(NOT_PRELOADED))]:
        with contextlib.suppress(Exception):  # the program that needs it will say so
            importlib.import_module(name)
    imported_with = {name: {before.get(name), os.environ.get(name)} for name in before.keys() | os.environ.keys()}
    with contextlib.suppress(Exception):
        aligner.config.schema.compose_config(["model.path=model"])  # the schema, and Hydra's own grammar and plugins
    gc.freeze()
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started threads, which no fork would have"
    signal.signal(signal.SIGINT, interrupt)
    warnings.showwarning = show
    _serve(connection, imported_with, path)


def _end() -> NoReturn:
    """Leave a forked program as the interpreter does, but for taking down what has been imported (1 to 2 s of CPU)."""
    code: Any = 0
    try:
        try:
            _main()
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as leaving:
        code = leaving.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 255)


if __name__ == "__main__":
    sys.modules["tests.fork_server"] = sys.modules["__main__"]
    _end()
