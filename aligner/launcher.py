"""torchrun, with an end that says what has happened: `python -m aligner.launcher TORCHRUN-ARGUMENTS...`.

The arguments, the agent and the ranks are torchrun's own. What differs is the end:

- A SIGTERM, SIGINT or other signal that the ranks have answered by saving and leaving ends with status 0. torchrun itself
  ends with the traceback of a SignalException and status 1, whatever its ranks have done.
- A second SIGINT (Ctrl-C) reaches the ranks, which then leave at once.
- Under nohup, SIGHUP is ignored; torchrun ends at it nevertheless.
- Ranks have 600 s to save (torchrun's --shutdown-timeout, 30 s there); one that hangs is found by its own watch.
- A rank that fails has said why; its status is the launcher's, and torchrun's traceback of it is left out.
- The folder for logs that torchrun makes in TMPDIR is removed, unless --redirects or --tee write there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from aligner.health.process_exit import EXIT_STATUS_FOLDER, exit_on_signal, temporary_folder

SHUTDOWN_SECONDS = 600
ONE_PRESS = 2.0
"""Seconds in which several SIGINT are one: a terminal and a `timeout` between both send it."""
QUIET = (
    "torch.distributed.run",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
"""Loggers that tell at WARNING of each signal that is passed on, and of OMP_NUM_THREADS."""


def main(arguments: list[str] | None = None) -> int:
    """torchrun with these arguments. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_on_signal)
    logs = any(re.match(r"(-r|-t|--redirects|--tee)(=|$|\d)", one) for one in _options(arguments))
    if logs and not any(re.match(r"--log[-_]dir", one) for one in _options(arguments)):
        return _run(arguments, None)  # its logs are to stay, where torchrun puts them
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

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).addFilter(lambda record: not record.msg.startswith("failed (exitcode"))  # told below
    ours = ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        ours += ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"]
    given = parse_args([*ours, *arguments])  # of two, the later counts
    _pass_on_a_second_interrupt()
    try:
        run(given)
    except SignalException as error:
        return _asked(error.sigval, ends)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"with status {code}" if code > 0 else f"by {failure.signal_name()}"
        _say(f"aligner: rank {rank} ended {how}.")
        return code if code > 0 else 128 - code
    except RendezvousConnectionError:
        _say(f"aligner: the launcher of the first node has ended, and so does that of {socket.gethostname()}.")
        return 1
    return 0


def _asked(number: signal.Signals, ends: Path | None) -> int:
    """The status after a signal: 0 where every rank of this host has come to its good end."""
    told = [file.read_text().split() for file in ends.iterdir()] if ends is not None else []
    if not told or len(told) < int(told[0][0]):
        _say(f"aligner: {number.name}: ranks were ended before they could save; the last whole checkpoint stays.")
        return 128 + number
    return 128 + number if any(code != "0" for _, code in told) else 0


def _pass_on_a_second_interrupt() -> None:
    """torchrun's agent passes one signal on, and breaks off at the next while its ranks are still saving."""
    bell, ear = socket.socketpair()
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        first = None
        while True:
            select.select([ear], [], [])
            if signal.SIGINT not in ear.recv(4096):
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > ONE_PRESS:
                for pid in _children():
                    with contextlib.suppress(OSError):
                        os.killpg(pid, signal.SIGINT)  # each rank leads a session of its own

    threading.Thread(target=listen, name="aligner-launcher", daemon=True).start()
    listen.bell = bell  # type: ignore[attr-defined]  # stays open as long as the thread


def _children() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(folder.name))
    return found


def _options(arguments: list[str]) -> list[str]:
    """Those of torchrun; the program's own come after its name."""
    for number, one in enumerate(arguments):
        if one in ("-m", "--module") or one.endswith(".py"):
            return arguments[:number]
    return arguments


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
