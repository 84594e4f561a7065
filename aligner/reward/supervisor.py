"""Supervisor process between a rank and a worker: when either ends, it kills everything that the worker started.

    python -I -S supervisor.py REPORT_FD RANK_PID COMMAND ...

It runs COMMAND (the worker) as its child, writes the child's process id to REPORT_FD, and exits as the worker exits. It is
a subreaper (prctl): descendants that leave the worker's group or session, or outlive their parent, are reparented to it. It
has its own session, so that a signal to the job's process group does not end it early.
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
IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
POLL_S, POLL_WITHOUT_PIDFD_S = 1.0, 0.05
"""Seconds between two polls that reap reparented children; the second if pidfds are unavailable (old kernel or container
policy) and polling is the only way to notice that the rank or the worker has ended."""
KILL_TIMEOUT_S = 5.0
"""Longest wait for processes that SIGKILL does not end, such as those blocked on a disk."""
libc = ctypes.CDLL(None, use_errno=True)


def start(command: list[str]) -> int:
    """Fork and exec the worker, killed when this process ends, with the signal dispositions this process was started with."""
    supervisor = os.getpid()
    dispositions = {number: signal.getsignal(number) for number in IGNORED_SIGNALS}
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    worker = os.fork()
    if worker:
        return worker
    try:
        for number, handler in dispositions.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == supervisor:
            os.execv(command[0], command)
    finally:
        os._exit(1)


def reap(worker: int) -> tuple[int | None, bool]:
    """Reap ended children: (the worker's wait status if it has ended; whether children are left)."""
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
    """Process ids of all descendants of this process."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
            children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    pids = [os.getpid()]
    for process in pids:
        pids += children.get(process, [])
    return pids[1:]


def kill_descendants() -> None:
    """Kill all descendants, repeatedly, since orphans are reparented to this process."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while reap(0)[1] and time.monotonic() < deadline:
        for process in descendants():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def poll_for_end(poller: select.poll, process: int) -> bool:
    """Make the poll return when the process ends. False: the kernel has no pidfd."""
    try:
        poller.register(os.pidfd_open(process), select.POLLIN)
    except (OSError, AttributeError):
        return False
    return True


def exit_as(status: int) -> None:
    """Exit with the worker's exit code, or by the signal that ended it."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL's handler cannot be set
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def main() -> None:
    """See the module docstring."""
    report, rank, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(report, False)
    os.setsid()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    poller = select.poll()
    has_pidfds = poll_for_end(poller, rank)
    if os.getppid() != rank:  # the rank has ended, and its process id may be reused
        os._exit(1)
    worker = start(command)
    has_pidfds = poll_for_end(poller, worker) and has_pidfds
    os.write(report, str(worker).encode())
    os.close(report)
    devnull = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # so that readers of the job's output do not wait for this process
        os.dup2(devnull, number)
    status = None
    while status is None:
        poller.poll((POLL_S if has_pidfds else POLL_WITHOUT_PIDFD_S) * 1000)
        if os.getppid() != rank:
            os.kill(worker, signal.SIGKILL)
        status = reap(worker)[0]
    kill_descendants()
    exit_as(status)


if __name__ == "__main__":
    main()
