"""Many episodes at once in environment processes outside the ranks; nothing here waits but `poll` (and the start)."""

from __future__ import annotations

import selectors
import signal
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aligner.environments.answers import WrongAnswerError, final_of, same_as_before, seconds_of, thread_of, turn_of
from aligner.environments.blame import CRASH_LOG_BYTES, Call, crash_suspects, stall_suspects
from aligner.environments.config import EnvironmentConfig
from aligner.environments.process import EnvironmentProcess, ProtocolError, interpreter
from aligner.environments.protocol import FAILURES, Action, Failed, Finished, Opened, PoolEvent, Stepped, Turn
from aligner.environments.slots import OpenEpisode, Slot, lateness

__all__ = ["Action", "EnvironmentPool", "Failed", "Finished", "Opened", "PoolEvent", "Stepped", "Turn", "check_start"]

MAX_LOSSES = 2
"""Processes that an episode may lose to others; then it gets one for itself, which nobody else can end."""
COUNTED_PAUSE_S = 1.0
"""Of the time between two polls, in which the rank generates or trains, no more than this counts towards the limit of a call: its
answer may have been waiting for the rank ever since, behind others in a full pipe."""
MAX_BAD_STARTS = 3
"""Processes in a row that end while they start, before the job is ended."""


class EnvironmentPool:
    """Environment processes and the episodes in them.

    An episode is `open`, then `step` after each event, then `finish` (or `drop`); each of the first three is answered by one
    event of `poll`, in any order between episodes. A `Failed` takes the place of whichever event was expected.

    A call that exceeds its limit, or needs too much memory, costs its process. The other episodes of that process go on in
    another: their calls are replayed there, and must be answered as before (`environment.replay`). Where a process ends and
    several calls were running in it, each of these episodes goes on in a process for itself, which shows whose fault it is;
    so does an episode that has lost `MAX_LOSSES` processes to others.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        """Start the processes and wait until the environment is imported in each.

        Raises:
            ValueError: the environment cannot be made with these settings; names the setting.
        """
        interpreter(config)
        self._config = config
        self._selector = selectors.DefaultSelector()
        self._slots: dict[EnvironmentProcess, Slot] = {}
        self._episodes: dict[int, OpenEpisode] = {}
        self._waiting: deque[OpenEpisode] = deque()
        self._waiting_alone: deque[OpenEpisode] = deque()
        """Those of them that need a process for themselves are here instead."""
        self._events: list[PoolEvent] = []
        self._counts: dict[str, float] = defaultdict(float)
        self._call_id = 0
        self._bad_starts = 0
        self._started = False
        self._polled_at = time.monotonic()
        try:
            for _ in range(config.processes):
                self._start()
            while not all(slot.ready for slot in self._slots.values()):
                self._turn_over(config.start_timeout_s)
        except RuntimeError as error:
            self.close()
            raise ValueError(str(error)) from None
        except BaseException:
            self.close()
            raise
        self._started = True

    def open(self, episode: int, row: dict[str, Any], seed: int) -> None:
        """Reset an environment for an episode (a number that is not open): `Opened`. Beyond processes x
        episodes_per_process it waits until another is closed.

        Args:
            row: the task: a JSON row of the data set.
            seed: of everything that the environment draws.
        """
        assert episode not in self._episodes, f"episode {episode} is open"
        opened = OpenEpisode(episode, [{"call": "open", "row": row, "seed": seed}])
        self._episodes[episode] = opened
        self._waiting.append(opened)
        self._place()

    def step(self, episode: int, action: Action) -> None:
        """Give the environment the policy's turn: `Stepped`."""
        calls = [dict(call) for call in action.tool_calls]
        self._next_call(episode, {"call": "step", "text": action.text, "tool_calls": calls})

    def finish(self, episode: int) -> None:
        """Ask for the final reward (None where the environment has none) and close the episode: `Finished`."""
        self._next_call(episode, {"call": "finish"})

    def pause(self, episode: int) -> None:
        """Until its next call others may take the place of an episode that has been answered; with episodes_per_process=1 they get
        another process. Ignored where it is not open."""
        if episode in self._episodes:
            self._episodes[episode].paused = True
            self._place()

    def poll(self, wait_s: float) -> list[PoolEvent]:
        """Events that have become ready; waits at most `wait_s` seconds for the first one.

        Raises:
            RuntimeError: the environment's processes end while they start, again and again.
        """
        end = time.monotonic() + wait_s
        self._turn_over(0.0)
        while not self._events and time.monotonic() < end:
            self._turn_over(end - time.monotonic())
        events, self._events = self._events, []
        return events

    def drop(self, episode: int) -> None:
        """Close an episode without an event; its running call is abandoned. Ignored where it is not open."""
        dropped = self._episodes.pop(episode, None)
        if dropped is None:
            return
        self._events = [event for event in self._events if event.episode != episode]
        dropped.dropped = True
        if dropped.process is None:
            self._queue_of(dropped).remove(dropped)
        elif dropped.running is None:
            self._release(dropped)

    def metrics(self) -> dict[str, float]:
        """Since the last call: `calls`, `call_s` (their seconds in all), `failed_KIND`, `restarts` (of processes) and
        `replays` (of episodes)."""
        counts, self._counts = self._counts, defaultdict(float)
        return dict(counts)

    def close(self) -> None:
        """End all processes. Idempotent."""
        for process in self._slots:
            process.kill()
        for process in self._slots:
            process.close()
        self._slots.clear()
        self._selector.close()

    # Calls of episodes

    def _next_call(self, number: int, call: dict[str, Any]) -> None:
        episode = self._episodes[number]
        assert len(episode.answers) == len(episode.calls), f"episode {number} has not been answered yet"
        episode.calls.append(call)
        episode.paused = False
        self._advance(episode)

    def _advance(self, episode: OpenEpisode) -> None:
        """Send the episode's next call, if it has a process that is not at work on one."""
        if episode.process is None or episode.running is not None or episode.position == len(episode.calls):
            return
        self._call_id += 1
        call = Call(self._call_id, episode.number, sent_at=time.monotonic())
        episode.running = call
        self._request(episode.process, {"id": call.id, "episode": episode.number, **episode.calls[episode.position]})

    def _request(self, process: EnvironmentProcess, request: dict[str, Any]) -> None:
        process.send(request)
        self._watch(process)

    def _watch(self, process: EnvironmentProcess) -> None:
        """Be woken when requests that wait can be written."""
        registered = process.request_fd in self._selector.get_map()
        if process.writing and not registered:
            self._selector.register(process.request_fd, selectors.EVENT_WRITE, process)
        elif registered and not process.writing:
            self._selector.unregister(process.request_fd)

    # Events of processes

    def _turn_over(self, wait_s: float) -> None:
        """Wait for something to happen, and deal with all that has."""
        self._leave_out_pause()
        self._place()
        wait_s = max(0.0, min(wait_s, self._next_deadline() - time.monotonic()))
        since = time.monotonic()
        for key, ready in self._selector.select(wait_s):
            process: EnvironmentProcess = key.data
            if process not in self._slots:  # lost to an event before this one
                continue
            if ready & selectors.EVENT_WRITE and key.fd == process.request_fd:
                process.write()
                self._watch(process)
            else:
                self._read(self._slots[process])
        self._check_deadlines(since)
        self._place()
        self._polled_at = time.monotonic()

    def _leave_out_pause(self) -> None:
        """Let the time since the last poll count no more than it may."""
        now = time.monotonic()
        left_out_s = now - self._polled_at - COUNTED_PAUSE_S
        if left_out_s > 0:
            for slot in self._slots.values():
                slot.postpone(left_out_s, now)

    def _read(self, slot: Slot) -> None:
        try:
            answers = slot.process.read()
        except ProtocolError as error:
            return self._lose(slot, "protocol", f"its process broke the protocol: {error}", slot.begun())
        slot.heard_at = time.monotonic()
        for answer in answers:
            if slot.process in self._slots:
                self._deal_with(slot, answer)
        if slot.process.ended and slot.process in self._slots:
            self._died(slot)

    def _deal_with(self, slot: Slot, answer: dict[str, Any]) -> None:
        if "unusable" in answer and not slot.ready:
            raise ValueError(f"{answer['unusable']}.")
        if "ready" in answer and not slot.ready:
            slot.ready, self._bad_starts = True, 0
        elif "pong" in answer:
            slot.silent = False
        elif "closed" in answer:
            return
        else:
            running = (one for one in slot.episodes.values() if one.running and one.running.id == answer.get("id"))
            episode = next(running, None)
            if episode is None:
                return self._lose(slot, "protocol", "its process answered what was not asked", slot.begun())
            self._answered(slot, episode, answer)

    def _answered(self, slot: Slot, episode: OpenEpisode, answer: dict[str, Any]) -> None:
        """An answer to the call that the episode waits for."""
        call = episode.running
        assert call is not None
        if "begun" in answer:
            call.begun_at, call.thread = time.monotonic(), thread_of(answer)
            return
        episode.running = None
        new = episode.position == len(episode.answers)
        if new:
            # By the process's own clock: the answer may have waited for this rank, which trains between two polls.
            seconds = seconds_of(answer)
            self._counts["calls"] += 1
            self._counts["call_s"] += seconds
            episode.seconds += seconds
        if answer.get("failed") == "memory":
            return self._lose(slot, "memory", str(answer.get("detail")), [episode])
        if episode.dropped:
            return self._release(episode, finished="final" in answer)
        try:
            self._take(episode, answer, new)
        except WrongAnswerError as error:
            self._fail(episode, "protocol", str(error))

    def _take(self, episode: OpenEpisode, answer: dict[str, Any], new: bool) -> None:
        """Note an answer, and tell it where it is new. Raises WrongAnswerError."""
        if "failed" in answer:
            kind = answer["failed"] if answer["failed"] in FAILURES else "protocol"
            return self._fail(episode, kind, str(answer.get("detail", "")))
        event: PoolEvent
        call = episode.calls[episode.position]["call"]
        if call == "finish":
            event = Finished(episode.number, *final_of(answer.get("final")))
            del self._episodes[episode.number]
            self._release(episode, finished=True)
            self._events.append(event)
            return
        turn = turn_of(answer.get("turn"))
        same = same_as_before(turn)
        if not new and same != episode.answers[episode.position]:
            detail = f"turn {episode.position} was answered differently in a new process: {same[:200]}"
            return self._fail(episode, "replay", detail)
        episode.position += 1
        if new:
            episode.answers.append(same)
            self._events.append((Opened if call == "open" else Stepped)(episode.number, turn))
        self._advance(episode)

    # Ends

    def _fail(self, episode: OpenEpisode, kind: str, detail: str) -> None:
        """Close an episode whose process lives or is already gone, with an event, in place of one that nobody has had yet."""
        self._counts[f"failed_{kind}"] += 1
        self._episodes.pop(episode.number, None)
        self._events = [event for event in self._events if event.episode != episode.number]
        self._events.append(Failed(episode.number, kind, detail))
        self._release(episode)

    def _release(self, episode: OpenEpisode, finished: bool = False) -> None:
        """Free the place of an episode without a running call. `finished`: the worker has closed it by itself."""
        slot = self._slots.get(episode.process) if episode.process else None
        episode.process = None
        if slot is None:
            return
        del slot.episodes[episode.number]
        if slot.extra:
            self._end(slot)
        elif not finished:
            self._request(slot.process, {"id": 0, "episode": episode.number, "call": "close"})

    def _end(self, slot: Slot) -> int:
        """End a process; its exit code."""
        del self._slots[slot.process]
        for fd in (slot.process.answer_fd, slot.process.request_fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        return slot.process.close()

    def _died(self, slot: Slot) -> None:
        """The process has ended by itself, or was killed from outside."""
        code = slot.process.wait()
        log, dump = slot.process.log_tail(), slot.process.log_tail(CRASH_LOG_BYTES)
        memory = " (SIGKILL: perhaps the host ran out of memory)" if code == -signal.SIGKILL else ""
        text = (
            f"its process was ended by signal {-code}{memory}"
            if code < 0
            else f"its process ended with exit code {code}"
        )
        detail = f"{text}; the end of its log: {log}" if log else text
        if not slot.ready:
            self._bad_starts += 1
            self._end(slot)
            if self._bad_starts >= MAX_BAD_STARTS or not self._started:
                raise RuntimeError(
                    f"environment.target={self._config.target}: an environment process does not start: {detail}"
                )
            self._start(extra=slot.extra)
            return
        calls = [episode.running for episode in slot.episodes.values() if episode.running]
        suspects = [slot.episodes[call.episode] for call in crash_suspects(calls, dump)]
        self._lose(slot, "crashed", detail, suspects, from_outside=code == -signal.SIGKILL)

    def _lose(
        self, slot: Slot, kind: str, detail: str, suspects: list[OpenEpisode], from_outside: bool = False
    ) -> None:
        """End a process for the fault of one of the suspects; the others in it go on elsewhere.

        Args:
            from_outside: it may be nobody's fault (SIGKILL): a suspect is sure only where it happens again to it alone.
        """
        self._end(slot)
        self._counts["restarts"] += 1
        if not slot.extra:
            self._start()
        sure = len(suspects) == 1 and (suspects[0].alone or not from_outside)
        for episode in list(slot.episodes.values()):
            episode.running, episode.position, episode.process = None, 0, None
            if episode.dropped:
                continue
            suspected = episode in suspects
            if suspected and (sure or not self._config.replay):
                self._fail(episode, kind, detail)
                continue
            episode.losses += 1
            if slot.extra and episode.losses > MAX_LOSSES:  # again and again, and nobody else is there
                self._fail(episode, kind, detail)
            elif not self._config.replay:
                self._fail(episode, "collateral", f"its process was lost to another episode ({kind}): {detail}")
            else:
                self._counts["replays"] += 1
                episode.alone |= suspected or episode.losses >= MAX_LOSSES
                self._queue_of(episode).appendleft(episode)

    # Time limits

    def _next_deadline(self) -> float:
        return min((slot.deadline(self._config) for slot in self._slots.values()), default=float("inf"))

    def _check_deadlines(self, since: float) -> None:
        """Look at the processes whose time has come; not at those in the midst of an answer, heard since a time."""
        now = time.monotonic()
        for slot in list(self._slots.values()):
            if now < slot.deadline(self._config) or (slot.process.reading and slot.heard_at >= since):
                continue
            if not slot.ready:
                raise RuntimeError(
                    f"environment.target={self._config.target} was not imported within environment.start_timeout_s="
                    f"{self._config.start_timeout_s:g}; raise it, or see its log: {slot.process.log_tail()}"
                )
            limits = slot.limits(self._config)
            late = [episode for episode, limit in limits if now >= limit]
            if late:
                self._late(slot, late)
                continue
            for episode, limit in limits:
                assert episode.running is not None
                episode.running.asked |= now >= limit - self._config.step_timeout_s / 2
            slot.silent = True
            self._request(slot.process, {"ping": self._call_id})

    def _late(self, slot: Slot, late: list[OpenEpisode]) -> None:
        """Calls have exceeded their limit: their process is killed, since a thread cannot be."""
        suspects = late[:1]
        if slot.silent:  # one of its calls keeps Python's global lock, and need not be one that is late
            calls = [episode.running for episode in slot.episodes.values() if episode.running]
            suspects = [slot.episodes[call.episode] for call in stall_suspects(calls, slot.process)] or suspects
        else:  # each of the others would only cost another process
            for episode in late[1:]:
                if not episode.dropped:
                    self._fail_in_lost(slot, episode, *lateness(episode, self._config))
        self._lose(slot, *lateness(suspects[0], self._config), suspects)

    def _fail_in_lost(self, slot: Slot, episode: OpenEpisode, kind: str, detail: str) -> None:
        del slot.episodes[episode.number]
        episode.process = episode.running = None
        self._fail(episode, kind, detail)

    # Places

    def _start(self, extra: bool = False) -> None:
        process = EnvironmentProcess(self._config)
        self._slots[process] = Slot(process, extra=extra)
        self._selector.register(process.answer_fd, selectors.EVENT_READ, process)
        self._watch(process)

    def _place(self) -> None:
        """Give waiting episodes a process."""
        for waiting, free_slot in ((self._waiting, self._shared_slot), (self._waiting_alone, self._extra_slot)):
            while waiting and (slot := free_slot()) is not None:
                episode = waiting.popleft()
                slot.episodes[episode.number] = episode
                episode.process = slot.process
                self._advance(episode)
        self._end_surplus()

    def _queue_of(self, episode: OpenEpisode) -> deque[OpenEpisode]:
        """Where an episode waits for a process."""
        return self._waiting_alone if episode.alone else self._waiting

    def _shared_slot(self) -> Slot | None:
        """The emptiest process that has room for an episode."""
        limit = self._config.episodes_per_process
        shared = [slot for slot in self._slots.values() if not slot.extra]
        room = [slot for slot in shared if slot.ready and slot.taken < limit and (limit > 1 or not slot.episodes)]
        if not room and limit == 1 and self._may_start(shared):
            self._start()
        return min(room, key=lambda slot: (slot.taken, len(slot.episodes)), default=None)

    def _extra_slot(self) -> Slot | None:
        """A process for an episode alone; one is started where there may be more."""
        extra = [slot for slot in self._slots.values() if slot.extra]
        free = [slot for slot in extra if not slot.episodes]
        if not free and self._may_start(extra):
            self._start(extra=True)
        return next((slot for slot in free if slot.ready), None)

    def _may_start(self, slots: Sequence[Slot]) -> bool:
        """Whether fewer of these processes than `processes` are at work or start: the others hold episodes that are paused."""
        return sum(slot.taken > 0 or not slot.episodes for slot in slots) < self._config.processes

    def _end_surplus(self) -> None:
        """End empty processes that were started beside those of paused episodes."""
        if not self._waiting_alone:
            for slot in [slot for slot in self._slots.values() if slot.extra and not slot.episodes]:
                self._end(slot)
        shared = [slot for slot in self._slots.values() if not slot.extra]
        empty = [slot for slot in shared if slot.ready and not slot.episodes]
        if not self._waiting:
            for slot in empty[: max(0, len(shared) - self._config.processes)]:
                self._end(slot)


def check_start(config: EnvironmentConfig) -> None:
    """Start one process and end it again. Raises ValueError as `EnvironmentPool` does."""
    EnvironmentPool(replace(config, processes=1)).close()
