"""A thread per rank that ends a job which can go no further: one report on file and console, then every rank leaves.

Each rank publishes in the job's store: a heartbeat (40 bytes, every `PERIOD` seconds), its journal's recent digests and
where it stands, both only when they are new. Rank 0 compares them; all others look after rank 0, and after the next
process on their host. The first verdict is final: every rank reads it within `PERIOD` seconds, says what it was doing, and
leaves as soon as the rank that gave the verdict has written the report.
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

from aligner.health import fault_report as epilogue
from aligner.health import rank_status as doctor
from aligner.health.activity import Activity
from aligner.health.config import HangConfig
from aligner.health.crash_stacks import CrashStacks
from aligner.health.heartbeat import Heartbeats, Verdict, beat_of
from aligner.health.journal import Journal, agree, as_bytes, first_difference, from_bytes
from aligner.health.local_processes import LocalProcesses, out_of_memory_kills, this_process
from aligner.health.process_exit import at_once, end
from aligner.health.process_identity import GONE, STOPPED
from aligner.health.store import own_store

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds that ranks get to say what they were doing, and that a SIGTERM gets to be explained by a death."""
ONE_PRESS = 2.0
"""Seconds in which several SIGINT are one: launchers pass on what a rank may have had from the terminal, or from Slurm."""
PATIENCE = 4 * GRACE
"""Seconds after which a rank leaves without having heard that the report is written."""


class Watch:
    """Runs beside the loop; never touches the process groups, only its own connection to the store."""

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
            run_dir: reports go to its folder `faults`; None: to the console only.
        """
        self.journal, self.activity, self.rank, self.size, self.period = journal, activity, rank, size, period
        self.config = config or HangConfig()
        self.folder = Path(run_dir) / doctor.FOLDER if run_dir is not None else None
        self.store = own_store("watch", attempt)  # a blocking call of the main thread must not hold up the watch
        self.neighbours = LocalProcesses(self.store, this_process(rank), int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        self.hide: Callable[[str], str] = str
        """Takes secrets out of what is said."""
        self._last_words = CrashStacks(self.folder, rank, 0.6 * self.config.dead_seconds)
        self._pulse = Heartbeats(range(size) if rank == 0 else [0], self.config)
        self._launched = bool(attempt)
        self._published, self._beats, self._all_there = -1, 0, False
        self._heard: tuple[Any, ...] = ()
        self._stopped_at: dict[int, float] = {}
        self._kills = out_of_memory_kills()
        self._end_at: float | None = None
        self._interrupted_at: float | None = None
        self._error: BaseException | None = None
        self._bell, self._ear = socket.socketpair()
        self._looked_at = time.monotonic()
        self.stopped = threading.Event()
        self._listen()
        self.thread = threading.Thread(target=self._run, name=doctor.OWN_THREAD, daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch_store, name=doctor.OWN_THREAD, daemon=True).start()

    def stop(self) -> None:
        """End the thread (a clean end of the job)."""
        self.store.add(f"ends/{self.rank}", 1)  # answered by the store, so that nobody takes the end for a death
        self.stopped.set()
        self._bell.send(b"\0")
        self.thread.join(timeout=2 * self.period + GRACE)
        self._last_words.close()

    def dead(self) -> list[int]:
        """Ranks known to be dead, stopped or silent: their processes on this host are gone or stopped, or the job's
        verdict says so. May be called from any thread, and in a signal's handler."""
        found = {
            rank for rank, state in self.neighbours.states().items() if state == STOPPED or self._died(rank, state)
        }
        if self.store.check(["verdict"]):
            verdict = json.loads(self.store.get("verdict"))
            found |= set(verdict["ranks"] if verdict["kind"] in ("dead", "stopped", "silent") else ())
        return sorted(found)

    def fail(self, error: BaseException, message: str) -> None:
        """This rank's error ends the job: report it, unless something else has ended the job before."""
        self._error = error
        if epilogue.is_lost_connection(error):
            # Not the cause but what follows from it: the dead rank is about to be named, and this process to leave.
            self._bell.send(b"\0")
            self.stopped.wait(self.config.dead_seconds + GRACE)
        shown = "" if isinstance(error, ValueError) else "".join(traceback.format_exception(error))
        verdict = {"kind": "failed", "ranks": [self.rank], "message": message}
        first = self._propose(verdict)
        if first is None:
            sys.stderr.write(self.hide(f"aligner: error on rank {self.rank}: {message}\n{shown}"))
        elif first:
            self._say(verdict)
            self._report(verdict, shown)
        self.stopped.wait(PERIOD if first else PATIENCE)  # the watch leaves when the report is written
        self._last_words.close()

    def _run(self) -> None:
        try:
            while not self.stopped.is_set():
                self._publish()
                numbers = self._rest()
                if self.stopped.is_set():
                    return
                if signal.SIGINT in numbers:
                    self._interrupted()
                self._look(signal.SIGTERM in numbers)
                self._looked_at = time.monotonic()
                if self.store.check(["verdict"]):
                    self._leave(json.loads(self.store.get("verdict")))
        except (RuntimeError, ConnectionError) as error:
            if not self.stopped.is_set():
                self._store_lost(error)

    def _listen(self) -> None:
        """A SIGTERM reaches this thread while the main one is inside a collective: launchers send it after a death."""
        for half in (self._bell, self._ear):
            half.setblocking(False)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, at_once):
                signal.signal(number, _noted)
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)

    def _rest(self) -> bytes:
        """Until the next look. Returns the numbers of signals that have come."""
        select.select([self._ear], [], [], min(self.period, 0.2) if self._end_at else self.period)
        try:
            return self._ear.recv(4096)
        except BlockingIOError:
            return b""

    def _publish(self) -> None:
        self._last_words.again()
        self._beats += 1
        self.store.set(f"beat/{self.rank}", beat_of(self._beats, self.activity, self.journal))  # type: ignore[arg-type]
        calls = list(self.journal.calls)
        if calls[-1].number > self._published:
            self.store.set(f"calls/{self.rank}", as_bytes(calls))  # type: ignore[arg-type]  # bytes are taken too
            self._published = calls[-1].number
        brief = doctor.statement(self.rank, self.journal, self.activity, whole=False)
        heard = (self.activity.progress, brief["number"], brief["stacks"], brief["details"])
        if heard != self._heard:
            self.store.set(f"heard/{self.rank}", json.dumps(brief))
            self._heard = heard

    def _look(self, told_to_end: bool) -> None:
        if told_to_end and signal.getsignal(signal.SIGTERM) is _noted:
            self._end_at = time.monotonic() + GRACE
        verdict = self._of_processes(told_to_end) or self._of_beats()
        if verdict is not None:
            self._propose(verdict)
        elif self._end_at is not None and time.monotonic() > self._end_at and not self.dead():
            self.store.add(f"ends/{self.rank}", 1)
            sys.stderr.write(f"aligner: rank {self.rank} leaves because it was told to (SIGTERM).\n")
            sys.stderr.flush()
            end(128 + signal.SIGTERM)

    def _interrupted(self) -> None:
        """Ctrl-C: before there is anything to save, and the second time, this rank leaves at once."""
        again = self._interrupted_at is not None and time.monotonic() - self._interrupted_at > ONE_PRESS
        self._interrupted_at = self._interrupted_at or time.monotonic()
        early = signal.getsignal(signal.SIGINT) is _noted
        if not early and not again:
            return
        self.store.add(f"ends/{self.rank}", 1)
        if self.store.add("interrupted", 1) == 1:
            what = "again; it leaves at once, and" if again else "before the first step;"
            sys.stderr.write(f"aligner: SIGINT {what} the last whole checkpoint, if there is one, stays.\n")
        end(128 + signal.SIGINT)

    def _of_processes(self, told_to_end: bool) -> Verdict | None:
        """The next rank on this host (so that each is looked after by one), and all of them where that one is dead or the job is
        told to end."""
        others = sorted(self.neighbours.all())
        after = [rank for rank in others if rank > self.rank] or others
        if not after:
            return None
        state = self.neighbours.all()[after[0]].state()
        if told_to_end or self._end_at is not None or self._died(after[0], state):
            dead = [rank for rank, state in self.neighbours.states().items() if self._died(rank, state)]
            return {"kind": "dead", "ranks": dead} if dead else None
        if state != STOPPED:
            self._stopped_at.pop(after[0], None)
            return None
        seconds = time.monotonic() - self._stopped_at.setdefault(after[0], time.monotonic())
        late = seconds > self.config.dead_seconds
        return {"kind": "stopped", "ranks": [after[0]], "seconds": seconds} if late else None

    def _died(self, rank: int, state: str) -> bool:
        return state == GONE and not self.store.check([f"ends/{rank}"])

    def _of_beats(self) -> Verdict | None:
        """Rank 0: of everybody's; others: of rank 0's."""
        keys = [f"{kind}/{rank}" for rank in self._pulse.ranks for kind in ("beat", "calls")]
        self._all_there = self._all_there or self.store.check(keys)
        if not self._all_there:
            return None
        published = self.store.multi_get(keys[:1] if self.rank else keys)
        if self.rank == 0 and not agree(published[1::2]):
            number = first_difference([from_bytes(raw) for raw in published[1::2]])
            if number is not None:
                return {"kind": "lockstep", "ranks": list(range(self.size)), "number": number}
        verdict = self._pulse.look(published if self.rank else published[::2], time.monotonic())
        if verdict is None or verdict["kind"] != "silent":
            return verdict if self.rank == 0 else None  # who sees one rank only cannot say whom it waits for
        ended = [rank for rank in verdict["ranks"] if self.store.check([f"ends/{rank}"])]
        if ended:
            return None
        states = {self.neighbours.states().get(rank) for rank in verdict["ranks"]}
        kind = {GONE: "dead", STOPPED: "stopped"}.get(str(states.pop()), "silent") if len(states) == 1 else "silent"
        return {**verdict, "kind": kind}

    def _propose(self, verdict: Verdict) -> bool | None:
        """Whether it is the job's first; None: the store's host has left."""
        text = json.dumps({**verdict, "by": self.rank})
        try:
            return self.store.compare_set("verdict", "", text).decode() == text
        except RuntimeError:
            return None

    def _leave(self, verdict: Verdict) -> None:
        """Say what this rank was doing; report, or wait for the report; leave."""
        self._looked_at = math.inf
        failed = verdict["kind"] == "failed"
        if verdict["by"] == self.rank and failed:
            time.sleep(PATIENCE + GRACE)  # the main thread reports and leaves by itself
            end(1)
        try:
            self._say(verdict)
            if failed:
                sys.stderr.write(f"aligner: rank {self.rank} leaves because rank {verdict['by']} failed.\n")
                sys.stderr.flush()
            if verdict["by"] == self.rank:
                self._report(verdict)
            else:
                epilogue.wait_until(lambda: self.store.check(["reported"]), PATIENCE)
        finally:
            if verdict["kind"] in ("stopped", "silent"):
                self._kill(verdict["ranks"])
            self._last_words.close()
            end(1)

    def _kill(self, ranks: list[int]) -> None:
        """A rank that cannot hear would keep its launcher waiting for 30 s more."""
        for process in (self.neighbours.all()[rank] for rank in ranks if rank in self.neighbours.all()):
            if process.state() != GONE:
                os.kill(process.pid, signal.SIGKILL)

    def _say(self, verdict: Verdict) -> None:
        mine = doctor.statement(self.rank, self.journal, self.activity, error=self._error)
        there = self.journal.at(verdict["number"]) if "number" in verdict else None
        mine |= {"there": str(there) if there else "", "kills": out_of_memory_kills() - self._kills}
        self.store.set(f"said/{self.rank}", json.dumps(mine))

    def _report(self, verdict: Verdict, error: str = "") -> None:
        named = set(verdict["ranks"]) if verdict["kind"] in ("dead", "stopped", "silent") else set()
        said, heard = epilogue.collect(self.store, self.size, named, GRACE)
        epilogue.publish(verdict, said, heard, self.size, self.folder, error, self.hide)
        self.store.set("reported", "1")

    def _watch_store(self) -> None:
        """A call to a store whose host is frozen, or whose network is gone, waits for ever."""
        last = time.monotonic()
        while not self.stopped.wait(self.period):
            now = time.monotonic()
            if now - last > self.config.dead_seconds / 2:  # it was this process that slept
                self._looked_at = max(self._looked_at, now)
            last = now
            if now - self._looked_at > self.config.dead_seconds + GRACE:
                self._store_lost(TimeoutError(f"no answer for {now - self._looked_at:.0f} s"))

    def _store_lost(self, error: Exception) -> None:
        """The launcher of the first host has ended, or rank 0 where there is no launcher: nobody can be asked,
        and any call to the store may wait for ever."""
        # With a launcher, who is gone was only faster to leave: a death would have been a verdict before.
        gone = [] if self._launched else [r for r, process in self.neighbours.all().items() if process.state() == GONE]
        mine = doctor.statement(self.rank, self.journal, self.activity)
        epilogue.alone(
            mine, f"{type(error).__name__}: {error}", gone, min([self.rank, *self._living()]), self.folder, self.hide
        )
        end(1)

    def _living(self) -> list[int]:
        return [rank for rank, process in self.neighbours.known.items() if process.state() != GONE]


def _noted(number: int, frame: Any) -> None:
    """SIGTERM is told to the watch, which knows whether another rank has died."""
