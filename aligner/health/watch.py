"""The watch thread of each rank: detects faults and ends the job with one report, on file and console.

Each rank publishes in the job's store: a heartbeat (40 bytes, every `PERIOD` seconds), its journal's recent digests and its
status, the latter two only when they change. Rank 0 compares those of all ranks; every other rank watches rank 0 and the
process of the next rank on its host. The first verdict is final: every rank reads it within `PERIOD` seconds, publishes its
final status, and exits as soon as the rank that gave the verdict has written the report.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligner.health import fault_report, rank_status
from aligner.health.activity import Activity
from aligner.health.config import HangConfig
from aligner.health.crash_stacks import CrashStacks
from aligner.health.heartbeat import Heartbeats, Verdict, beat_of
from aligner.health.journal import Journal, first_difference, histories_agree, history_as_bytes, history_from_bytes
from aligner.health.local_processes import LocalProcesses, out_of_memory_kills, this_process
from aligner.health.process_exit import exit_on_signal, exit_process
from aligner.health.process_identity import GONE, STOPPED
from aligner.health.store import own_store

PERIOD = 1.0
"""Seconds between two checks."""
GRACE = 3.0
"""Seconds that ranks have to publish their final status, and in which a SIGTERM may turn out to follow a death."""
ONE_PRESS = 2.0
"""Seconds within which several SIGINT count as one: launchers forward what ranks may get from the terminal or Slurm too."""
PATIENCE = 4 * GRACE
"""Seconds after which a rank exits without waiting longer for the report."""


class Watch:
    """The watch thread. It never uses the process groups, only its own connection to the store."""

    def __init__(
        self,
        journal: Journal,
        activity: Activity,
        rank: int,
        size: int,
        attempt: str = "",
        config: HangConfig | None = None,
        run_dir: str | Path | None = None,
        period: float = PERIOD,
    ) -> None:
        """
        Args:
            journal, activity: of this rank, written by the main thread.
            attempt: see `agree_on_attempt`.
            run_dir: reports are written to its folder `faults`; None: to the console only.
            period: seconds between two checks.
        """
        self.journal, self.activity, self.rank, self.size, self.period = journal, activity, rank, size, period
        self.config = config or HangConfig()
        self.folder = Path(run_dir) / rank_status.FOLDER if run_dir is not None else None
        self.store = own_store("watch", attempt)  # not shared with the main thread, whose calls may block
        self.local_processes = LocalProcesses(
            self.store, this_process(rank), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        )
        self.hide: Callable[[str], str] = str
        """Masks secrets in messages."""
        self._crash_stacks = CrashStacks(self.folder, rank, 0.6 * self.config.dead_seconds)
        self._heartbeats = Heartbeats(range(size) if rank == 0 else [0], self.config)
        self._launched = bool(attempt)
        self._published, self._beats, self._all_published = -1, 0, False
        self._last_status: tuple[Any, ...] = ()
        self._stopped_at: dict[int, float] = {}
        self._kills = out_of_memory_kills()
        self._end_at: float | None = None
        self._interrupted_at: float | None = None
        self._error: BaseException | None = None
        self._signal_write, self._signal_read = socket.socketpair()
        self._looked_at = time.monotonic()
        self.stopped = threading.Event()
        self._receive_signals()
        self.thread = threading.Thread(target=self._run, name=rank_status.WATCH_THREAD, daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch_store, name=rank_status.WATCH_THREAD, daemon=True).start()

    def stop(self) -> None:
        """Stop the thread (a clean end of the job)."""
        self.store.add(f"ends/{self.rank}", 1)  # waits for the store's answer, so that the end is not taken for a death
        self.stopped.set()
        self._signal_write.send(b"\0")
        self.thread.join(timeout=2 * self.period + GRACE)
        self._crash_stacks.close()

    def dead(self) -> list[int]:
        """Ranks known to be dead, stopped or silent, from the processes on this host and the job's verdict. Thread-safe;
        may be called in a signal handler."""
        ranks = {
            rank for rank, state in self.local_processes.states().items() if state == STOPPED or self._died(rank, state)
        }
        if self.store.check(["verdict"]):
            verdict = json.loads(self.store.get("verdict"))
            ranks |= set(verdict["ranks"] if verdict["kind"] in ("dead", "stopped", "silent") else ())
        return sorted(ranks)

    def fail(self, error: BaseException, message: str) -> None:
        """End the job because of this rank's error, and report it, unless there is an earlier verdict."""
        self._error = error
        if fault_report.is_lost_connection(error):
            # A consequence, not the cause: the watch is about to report the dead rank and exit this process.
            self._signal_write.send(b"\0")
            self.stopped.wait(self.config.dead_seconds + GRACE)
        shown = "" if isinstance(error, ValueError) else "".join(traceback.format_exception(error))
        verdict = {"kind": "failed", "ranks": [self.rank], "message": message}
        first = self._propose(verdict)
        if first is None:
            sys.stderr.write(self.hide(f"aligner: error on rank {self.rank}: {message}\n{shown}"))
        elif first:
            self._publish_status(verdict)
            self._report(verdict, shown)
        self.stopped.wait(PERIOD if first else PATIENCE)  # the watch exits when the report is written
        self._crash_stacks.close()

    def _run(self) -> None:
        try:
            while not self.stopped.is_set():
                self._publish()
                numbers = self._wait()
                if self.stopped.is_set():
                    return
                if signal.SIGINT in numbers:
                    self._interrupted()
                self._check(signal.SIGTERM in numbers)
                self._looked_at = time.monotonic()
                if self.store.check(["verdict"]):
                    self._leave(json.loads(self.store.get("verdict")))
        except (RuntimeError, ConnectionError) as error:
            if not self.stopped.is_set():
                self._store_lost(error)

    def _receive_signals(self) -> None:
        """Receive signals through a wakeup fd, also while the main thread is inside a collective (launchers send SIGTERM
        after a death)."""
        for half in (self._signal_write, self._signal_read):
            half.setblocking(False)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, exit_on_signal):
                signal.signal(number, _ignore)
        signal.set_wakeup_fd(self._signal_write.fileno(), warn_on_full_buffer=False)

    def _wait(self) -> bytes:
        """Wait until the next check. Returns the numbers of the signals received."""
        select.select([self._signal_read], [], [], min(self.period, 0.2) if self._end_at else self.period)
        try:
            return self._signal_read.recv(4096)
        except BlockingIOError:
            return b""

    def _publish(self) -> None:
        self._crash_stacks.restart_timer()
        self._beats += 1
        self.store.set(f"beat/{self.rank}", beat_of(self._beats, self.activity, self.journal))  # type: ignore[arg-type]
        calls = list(self.journal.calls)
        if calls[-1].number > self._published:
            self.store.set(f"calls/{self.rank}", history_as_bytes(calls))  # type: ignore[arg-type]  # bytes are taken too
            self._published = calls[-1].number
        status = rank_status.current_status(self.rank, self.journal, self.activity, full=False)
        state = (self.activity.progress, status["number"], status["stacks"], status["details"])
        if state != self._last_status:
            self.store.set(f"brief/{self.rank}", json.dumps(status))
            self._last_status = state

    def _check(self, got_sigterm: bool) -> None:
        if got_sigterm and signal.getsignal(signal.SIGTERM) is _ignore:
            self._end_at = time.monotonic() + GRACE
        verdict = self._check_processes(got_sigterm) or self._check_heartbeats()
        if verdict is not None:
            self._propose(verdict)
        elif self._end_at is not None and time.monotonic() > self._end_at and not self.dead():
            self.store.add(f"ends/{self.rank}", 1)
            sys.stderr.write(f"aligner: rank {self.rank} exits because of SIGTERM.\n")
            sys.stderr.flush()
            exit_process(128 + signal.SIGTERM)

    def _interrupted(self) -> None:
        """Ctrl-C: exit immediately before the first step, and at the second one."""
        restart_timer = self._interrupted_at is not None and time.monotonic() - self._interrupted_at > ONE_PRESS
        self._interrupted_at = self._interrupted_at or time.monotonic()
        early = signal.getsignal(signal.SIGINT) is _ignore
        if not early and not restart_timer:
            return
        self.store.add(f"ends/{self.rank}", 1)
        if self.store.add("interrupted", 1) == 1:
            what = "again: exiting immediately" if restart_timer else "before the first step: exiting"
            sys.stderr.write(f"aligner: SIGINT {what}; the last complete checkpoint, if there is one, stays.\n")
        exit_process(128 + signal.SIGINT)

    def _check_processes(self, got_sigterm: bool) -> Verdict | None:
        """Check the process of the next rank on this host (so that each has one watcher), and all of them if that one is dead
        or the job got a SIGTERM."""
        others = sorted(self.local_processes.all())
        after = [rank for rank in others if rank > self.rank] or others
        if not after:
            return None
        state = self.local_processes.all()[after[0]].state()
        if got_sigterm or self._end_at is not None or self._died(after[0], state):
            dead = [rank for rank, state in self.local_processes.states().items() if self._died(rank, state)]
            return {"kind": "dead", "ranks": dead} if dead else None
        if state != STOPPED:
            self._stopped_at.pop(after[0], None)
            return None
        seconds = time.monotonic() - self._stopped_at.setdefault(after[0], time.monotonic())
        late = seconds > self.config.dead_seconds
        return {"kind": "stopped", "ranks": [after[0]], "seconds": seconds} if late else None

    def _died(self, rank: int, state: str) -> bool:
        return state == GONE and not self.store.check([f"ends/{rank}"])

    def _check_heartbeats(self) -> Verdict | None:
        """Check heartbeats and journals: rank 0 those of all ranks, others only rank 0's heartbeat."""
        keys = [f"{kind}/{rank}" for rank in self._heartbeats.ranks for kind in ("beat", "calls")]
        self._all_published = self._all_published or self.store.check(keys)
        if not self._all_published:
            return None
        published = self.store.multi_get(keys[:1] if self.rank else keys)
        if self.rank == 0 and not histories_agree(published[1::2]):
            number = first_difference([history_from_bytes(raw) for raw in published[1::2]])
            if number is not None:
                return {"kind": "lockstep", "ranks": list(range(self.size)), "number": number}
        verdict = self._heartbeats.check(published if self.rank else published[::2], time.monotonic())
        if verdict is None or verdict["kind"] != "silent":
            return (
                verdict if self.rank == 0 else None
            )  # from one rank's heartbeat alone it is unknown whom that rank waits for
        ended = [rank for rank in verdict["ranks"] if self.store.check([f"ends/{rank}"])]
        if ended:
            return None
        states = {self.local_processes.states().get(rank) for rank in verdict["ranks"]}
        kind = {GONE: "dead", STOPPED: "stopped"}.get(str(states.pop()), "silent") if len(states) == 1 else "silent"
        return {**verdict, "kind": kind}

    def _propose(self, verdict: Verdict) -> bool | None:
        """Publish a verdict. Returns whether it is the job's first; None if the store is gone."""
        text = json.dumps({**verdict, "by": self.rank})
        try:
            return self.store.compare_set("verdict", "", text).decode() == text
        except RuntimeError:
            return None

    def _leave(self, verdict: Verdict) -> None:
        """Publish the final status, write the report or wait for it, and exit."""
        self._looked_at = math.inf
        failed = verdict["kind"] == "failed"
        if verdict["by"] == self.rank and failed:
            time.sleep(PATIENCE + GRACE)  # the main thread reports and exits by itself
            exit_process(1)
        try:
            self._publish_status(verdict)
            if failed:
                sys.stderr.write(f"aligner: rank {self.rank} exits because rank {verdict['by']} failed.\n")
                sys.stderr.flush()
            if verdict["by"] == self.rank:
                self._report(verdict)
            else:
                fault_report.wait_until(lambda: self.store.check(["reported"]), PATIENCE)
        finally:
            if verdict["kind"] in ("stopped", "silent"):
                self._kill(verdict["ranks"])
            self._crash_stacks.close()
            exit_process(1)

    def _kill(self, ranks: list[int]) -> None:
        """Kill ranks that cannot react; their launcher would wait 30 s for them."""
        for process in (self.local_processes.all()[rank] for rank in ranks if rank in self.local_processes.all()):
            if process.state() != GONE:
                os.kill(process.pid, signal.SIGKILL)

    def _publish_status(self, verdict: Verdict) -> None:
        status = rank_status.current_status(self.rank, self.journal, self.activity, error=self._error)
        call = self.journal.at(verdict["number"]) if "number" in verdict else None
        status |= {"there": str(call) if call else "", "kills": out_of_memory_kills() - self._kills}
        self.store.set(f"status/{self.rank}", json.dumps(status))

    def _report(self, verdict: Verdict, error: str = "") -> None:
        named = set(verdict["ranks"]) if verdict["kind"] in ("dead", "stopped", "silent") else set()
        final, last_known = fault_report.collect(self.store, self.size, named, GRACE)
        fault_report.write_fault_report(verdict, final, last_known, self.size, self.folder, error, self.hide)
        self.store.set("reported", "1")

    def _watch_store(self) -> None:
        """Second thread: detects that calls to the store block forever (its host is frozen or unreachable)."""
        last = time.monotonic()
        while not self.stopped.wait(self.period):
            now = time.monotonic()
            if now - last > self.config.dead_seconds / 2:  # this process itself was suspended
                self._looked_at = max(self._looked_at, now)
            last = now
            if now - self._looked_at > self.config.dead_seconds + GRACE:
                self._store_lost(TimeoutError(f"no answer for {now - self._looked_at:.0f} s"))

    def _store_lost(self, error: Exception) -> None:
        """The store is gone (the launcher of the first host, or rank 0 without a launcher, has ended), so each rank reports
        alone and exits."""
        # With a launcher, ranks that are gone merely exited earlier: a death would have given a verdict before.
        gone = (
            []
            if self._launched
            else [r for r, process in self.local_processes.all().items() if process.state() == GONE]
        )
        status = rank_status.current_status(self.rank, self.journal, self.activity)
        fault_report.report_alone(
            status, f"{type(error).__name__}: {error}", gone, min([self.rank, *self._living()]), self.folder, self.hide
        )
        exit_process(1)

    def _living(self) -> list[int]:
        return [rank for rank, process in self.local_processes.known.items() if process.state() != GONE]


def _ignore(number: int, frame: Any) -> None:
    """Handler of SIGTERM and SIGINT: the watch thread handles them through the wakeup fd."""
