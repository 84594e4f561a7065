"""Start torchrun jobs from a server that has imported it: the import takes as long as many a test's job.

Everything after the import is torchrun's own: its agent, its processes for the ranks, its exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch.distributed.run", "pytest"]
)  # pytest: each child looks at the parent's main module


def launch(
    ranks: int, program: Sequence[str], *, cwd: Path, env: Mapping[str, str], seconds: float
) -> CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node=RANKS PROGRAM` in a session of its own.

    Ends when nobody holds its output open any more, ranks that outlive their launcher among them. Over its time limit the
    launcher is killed; ranks follow, and TimeoutExpired has what they said.
    """
    arguments = ["--standalone", f"--nproc-per-node={ranks}", *program]
    pipes = [_server.Pipe(duplex=False) for _ in range(2)]
    process = _server.Process(target=_become, args=(arguments, str(cwd), dict(env), *(end for _, end in pipes)))
    process.start()
    for _, end in pipes:
        end.close()
    with ThreadPoolExecutor(len(pipes)) as pool:
        reading = [pool.submit(_read, begin) for begin, _ in pipes]
        process.join(seconds)
        late = process.is_alive()
        if late:
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
        out, err = (said.result() for said in reading)
    if late:
        raise TimeoutExpired(arguments, seconds, out, err)
    return CompletedProcess(arguments, process.exitcode or 0, out, err)


def _read(pipe: Connection) -> str:
    with open(os.dup(pipe.fileno()), encoding="utf-8", errors="replace") as file, pipe:
        return file.read()


def _become(arguments: list[str], cwd: str, env: dict[str, str], out: Connection, err: Connection) -> None:
    """In the server's child: the launcher itself."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, pipe in enumerate((out, err), start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    from torch.distributed import run

    sys.argv = [run.__file__, *arguments]
    run.main(arguments)
