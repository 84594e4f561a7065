"""Run as a program of its own, between a rank and a worker: when either ends, so does everything that the worker started.

    python -I -S supervisor.py REPORT_FD RANK COMMAND ...

It runs the command (the worker) as its child, whose process id it writes on REPORT_FD, and ends as the worker ends. It is
the subreaper of all below it: whoever leaves the worker's group or session, or outlives its own parent, comes to it as its
child. It has a session of its own, so that a signal to the job's group does not end it before it has done its work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OUTLIVED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LOOK_S, LOOK_ALONE_S = 1.0, 0.05
"""So often those that have come to this process, and ended, are taken leave of; the second where the kernel has no pidfd,
or a container forbids it, and nothing else tells that the rank or the worker has ended."""
END_S = 5.0
"""For whom no signal ends, as one that waits for a disk, nobody waits longer."""
libc = ctypes.CDLL(None, use_errno=True)


def start(command: list[str]) -> int:
    """The worker, which dies with this process and has the signals' settings that this process was started with."""
    keeper = os.getpid()
    before = {number: signal.getsignal(number) for number in OUTLIVED}
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    worker = os.fork()
    if worker:
        return worker
    try:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == keeper:
            os.execv(command[0], command)
    finally:
        os._exit(1)


def reap(worker: int) -> tuple[int | None, bool]:
    """(the worker's status, if it has ended; whether there are children left)."""
    status = None
    while True:
        try:
            ended, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status, False
        if ended == 0:
            return status, True
        if ended == worker:
            status = code


def descendants() -> list[int]:
    """Every process below this one."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
            children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def end_all() -> None:
    """Kill them until there is none: whose parent dies comes to this process."""
    deadline = time.monotonic() + END_S
    while reap(0)[1] and time.monotonic() < deadline:
        for process in descendants():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def watch(watched: select.poll, process: int) -> bool:
    """Have the poll return when the process ends, if that is possible."""
    try:
        watched.register(os.pidfd_open(process), select.POLLIN)
    except (OSError, AttributeError):
        return False
    return True


def end_as(status: int) -> None:
    """With the worker's own exit code, or by the signal that ended it."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler to set
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    """See the top of this file."""
    report, rank, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(report, False)
    os.setsid()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    watched = select.poll()
    seen = watch(watched, rank)
    if os.getppid() != rank:  # it has ended, and its number may be another's
        os._exit(1)
    worker = start(command)
    seen = watch(watched, worker) and seen
    os.write(report, str(worker).encode())
    os.close(report)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # whoever reads the job's output to its end does not wait for this process
        os.dup2(nothing, number)
    status = None
    while status is None:
        watched.poll((LOOK_S if seen else LOOK_ALONE_S) * 1000)
        if os.getppid() != rank:
            os.kill(worker, signal.SIGKILL)
        status = reap(worker)[0]
    end_all()
    end_as(status)


if __name__ == "__main__":
    main()
