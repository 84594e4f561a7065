"""torchrun with clean exits: `python -m aligner.launcher TORCHRUN-ARGUMENTS...`.

Arguments, agent and ranks are torchrun's own. Only the exit differs:

- After a SIGTERM, SIGINT or other signal at which all ranks saved and exited, the status is 0. torchrun itself exits with
  the traceback of a SignalException and status 1, whatever its ranks did.
- A second SIGINT (Ctrl-C) is forwarded to the ranks, which then exit immediately.
- Under nohup, SIGHUP is ignored; torchrun would exit.
- Ranks have 600 s to save (torchrun's --shutdown-timeout, default 30 s); a hanging one is detected by its own watch.
- A failed rank has already reported its error; its status becomes the launcher's, without torchrun's traceback.
- On GPUs each rank runs on the CPUs of its GPU's NUMA node, whose memory copies to and from the GPU twice as fast, where numactl
  is there and the host has several nodes; --numa-binding=... is torchrun's own option for other ways.
- torchrun's log folder in TMPDIR is removed, unless --redirects or --tee use it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from aligner.health.process_exit import EXIT_STATUS_FOLDER, exit_on_signal, temporary_folder
from aligner.spmd.device import device_type

SHUTDOWN_SECONDS = 600
NUMA_NODES = Path("/sys/devices/system/node")
ONE_PRESS = 2.0
"""Seconds within which several SIGINT count as one: a terminal and a `timeout` in between may both send it."""
QUIET_LOGGERS = (
    "torch.distributed.run",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
"""Loggers that warn about each forwarded signal and about OMP_NUM_THREADS."""


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun with these arguments (default: sys.argv). Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_on_signal)
    logs = any(re.match(r"(-r|-t|--redirects|--tee)(=|$|\d)", option) for option in _options(arguments))
    if logs and not any(re.match(r"--log[-_]dir", option) for option in _options(arguments)):
        return _run(arguments, None)  # keep the logs where torchrun puts them
    with temporary_folder() as folder:
        return _run(arguments, folder)


def _run(arguments: list[str], folder: Path | None) -> int:
    ends = None
    if folder is not None:
        ends = folder / "ends"
        ends.mkdir()
        os.environ[EXIT_STATUS_FOLDER] = str(ends)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.run import parse_args, run

    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).addFilter(
            lambda record: not record.msg.startswith("failed (exitcode")
        )  # reported below
    own_options = ["--shutdown-timeout", str(SHUTDOWN_SECONDS), *_numa_options(NUMA_NODES)]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        own_options += ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"]
    parsed = parse_args([*own_options, *arguments])  # the last occurrence of an option counts
    _forward_second_interrupt()
    try:
        run(parsed)
    except SignalException as error:
        return _status_after_signal(error.sigval, ends)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"with status {code}" if code > 0 else f"by {failure.signal_name()}"
        _print_error(f"aligner: rank {rank} ended {how}.")
        return code if code > 0 else 128 - code
    except RendezvousConnectionError:
        _print_error(
            f"aligner: the launcher of the first node has ended, so the one of {socket.gethostname()} ends too."
        )
        return 1
    return 0


def _numa_options(nodes: Path) -> list[str]:
    """Of ranks on GPUs; torch binds by the numactl command, and fails without."""
    several = len(list(nodes.glob("node[0-9]*"))) > 1
    with contextlib.suppress(ValueError):  # the ranks report a device that is none
        if device_type() == "cuda" and several and shutil.which("numactl") is not None:
            return ["--numa-binding", "node"]
    return []


def _status_after_signal(number: signal.Signals, ends: Path | None) -> int:
    """The exit status after a signal: 0 if all ranks of this host saved and exited with 0."""
    reports = [file.read_text().split() for file in ends.iterdir()] if ends is not None else []
    if not reports or len(reports) < int(reports[0][0]):
        _print_error(
            f"aligner: {number.name}: ranks were killed before they could save; the last complete checkpoint stays."
        )
        return 128 + number
    return 128 + number if any(code != "0" for _, code in reports) else 0


def _forward_second_interrupt() -> None:
    """Forward a second SIGINT to the ranks: torchrun's agent forwards the first, and stops handling signals while it waits."""
    signal_write, signal_read = socket.socketpair()
    signal_write.setblocking(False)
    signal.set_wakeup_fd(signal_write.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        first = None
        while True:
            select.select([signal_read], [], [])
            if signal.SIGINT not in signal_read.recv(4096):
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > ONE_PRESS:
                for pid in _children():
                    with contextlib.suppress(OSError):
                        os.killpg(pid, signal.SIGINT)  # each rank leads its own session

    threading.Thread(target=listen, name="aligner-launcher", daemon=True).start()
    listen.signal_write = signal_write  # type: ignore[attr-defined]  # keep the socket open as long as the thread


def _children() -> list[int]:
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                pids.append(int(folder.name))
    return pids


def _options(arguments: list[str]) -> list[str]:
    """torchrun's own options; the program's arguments follow its name."""
    for number, argument in enumerate(arguments):
        if argument in ("-m", "--module") or argument.endswith(".py"):
            return arguments[:number]
    return arguments


def _print_error(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
