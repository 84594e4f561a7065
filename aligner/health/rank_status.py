"""The status that a rank publishes when a job has to end, and the text of the report made from all ranks' statuses."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from aligner.health.activity import Activity
from aligner.health.heartbeat import Verdict
from aligner.health.journal import Journal

RankStatus = dict[str, Any]
"""One rank's status: rank, host, pid, step, number (of the role call), call, doing (activities), seconds (in the innermost
one), details, stacks and `at` (time.time())."""
FOLDER = "faults"
"""Folder of a run for fault reports."""
SHORT = 300
"""Longest excerpt of a sample, in characters."""
CONSOLE_RANKS = 32
"""Above this number of ranks the console shows groups of ranks; the file always lists each."""
WATCH_THREAD = "aligner-watch"


def current_status(
    rank: int, journal: Journal, activity: Activity, full: bool = True, error: BaseException | None = None
) -> RankStatus:
    """This rank's status; called from another thread than the main one.

    Args:
        whole: all threads' stacks with source lines; else only the main thread's file:line, which takes microseconds.
        error: exception that ended the main thread's work; its stack is shown instead of the current one.
    """
    chain, call = activity.chain(), journal.calls[-1]
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": journal.step,
        "number": call.number,
        "call": call.what,
        "doing": [[frame.kind, frame.what, [*frame.ranks]] for frame in chain[1:] or chain],
        "seconds": time.monotonic() - chain[-1].since,
        "details": _details(activity, full),
        "stacks": _stacks(error) if full else {"MainThread": _places(_main_frame())},
        "at": time.time(),
    }


def _details(activity: Activity, full: bool) -> list[str]:
    lines: list[str] = []
    for name, lines_of in list(activity.details.items()):
        try:
            lines += lines_of()
        except Exception as error:  # it reads another thread's objects while they change
            lines.append(f"{name}: not known ({error!r})")
    return lines if full else [line[:SHORT] for line in lines[:4]]


def excerpt(text: str) -> str:
    """A prompt or response as one line of about SHORT characters."""
    line = repr(text)
    return (
        line if len(line) <= SHORT else f"{line[: SHORT * 2 // 3]} [...] {line[-SHORT // 3 :]} ({len(text)} characters)"
    )


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _places(frame: FrameType | None) -> list[str]:
    """The innermost calls as file:line, without reading source files."""
    places: list[str] = []
    while frame is not None and len(places) < 25:
        code = frame.f_code
        places.insert(0, f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return places


def _stacks(error: BaseException | None) -> dict[str, list[str]]:
    """Thread name -> its calls, outermost first. The main thread comes first, the watch threads are omitted."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    stacks = {}
    for ident in sorted(frames, key=lambda ident: (ident != main, names.get(ident, ""), ident)):
        name = names.get(ident, f"thread {ident}")
        if name == WATCH_THREAD:
            continue
        of_error = error is not None and ident == main
        calls = (
            traceback.extract_tb(error.__traceback__) if error and of_error else traceback.extract_stack(frames[ident])
        )
        name = name if name not in stacks else f"{name} ({ident})"
        stacks[name] = [f"{entry.filename}:{entry.lineno} {entry.name}: {entry.line or ''}" for entry in calls]
        stacks[name] += [f"{type(error).__name__}: {str(error)[:SHORT]}"] if of_error else []
    return stacks


def ranks_text(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 3, 7] -> "0-3, 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def doing_text(status: RankStatus) -> str:
    """Such as "policy.update > waits for values of rank 3"."""
    words = []
    for kind, what, ranks in status["doing"]:
        suffix = f" of rank {ranks_text(ranks)}" if ranks else ""
        words.append(f"waits for {what}{suffix}" if kind == "wait" else what)
    return " > ".join(words)


def place_text(status: RankStatus | None) -> str:
    """Such as "step 3, call 17: policy.update"."""
    return f"step {status['step']}, call {status['number']}: {status['call']}" if status else "an unknown step"


def headline(verdict: Verdict, statuses: Mapping[int, RankStatus]) -> str:
    """The first line of a report: the cause and the ranks responsible."""
    first, ranks = verdict["ranks"][0], verdict["ranks"]
    who = f"rank {first}" if len(ranks) == 1 else f"ranks {ranks_text(ranks)}"
    first_status = statuses.get(first)
    process = f" (process {first_status['pid']} on {first_status['host']})" if first_status else ""
    at = f"at {place_text(first_status)}; in {doing_text(first_status)}" if first_status else "before its first status"
    # the last published status may be a second old, and short calls may have passed since
    others = [other for rank, other in statuses.items() if rank not in ranks]
    ahead = max(others, key=lambda other: int(other["number"]), default=None)
    beside = f"; others are at {place_text(ahead)}" if ahead else ""
    is_, has = ("is", "has") if len(ranks) == 1 else ("are", "have")
    if verdict["kind"] == "dead":
        return (
            f"{who} died{process if len(ranks) == 1 else ''}: killed, or exited by itself; last seen {at}"
            f"{beside}.{_killer(statuses)}"
        )
    if verdict["kind"] == "stopped":
        return f"{who} {is_} stopped{process}, for {verdict['seconds']:.0f} s (SIGSTOP, or a debugger) {at}{beside}."
    if verdict["kind"] == "silent":
        return (
            f"{who} {has} been silent for {verdict['seconds']:.0f} s (hang.dead_seconds){process} {at}{beside}. Either the host is "
            "down or frozen, or a computation holds Python's lock (the GIL)."
        )
    if verdict["kind"] == "hang":
        return (
            f"{who} {has} made no progress for {verdict['seconds']:.0f} s (hang.after_seconds, hang.setup_seconds) {at}, "
            f"for {first_status['seconds'] if first_status else 0:.0f} s."
        )
    return f"{who}: {verdict.get('message', verdict['kind'])}"


def _killer(statuses: Mapping[int, RankStatus]) -> str:
    kills = max((status.get("kills", 0) for status in statuses.values()), default=0)
    return f" The kernel's OOM killer has killed {kills} process(es) on this host since the job began." if kills else ""


def report_text(
    verdict: Verdict,
    final: Mapping[int, RankStatus],
    last_known: Mapping[int, RankStatus],
    size: int,
    stack_of: Callable[[int], str] = lambda rank: "",
) -> tuple[str, str, str]:
    """(headline, table of ranks, samples and stacks).

    Args:
        final: final statuses, by rank, of those that published one.
        last_known: the last periodic statuses, by rank.
        size: number of ranks.
        stack_of: rank -> its stack file written by `crash_stacks`, "" if there is none.
    """
    statuses = {**last_known, **final}
    rows = [_row(rank, statuses.get(rank), rank in final) for rank in range(size)]
    table = _table([("rank", "host", "pid", "step", "call", "activity", "seconds", "status"), *rows])
    parts = []
    details = [f"  rank {rank}: {line}" for rank in range(size) for line in statuses.get(rank, {}).get("details", [])]
    if details:
        parts.append("Being scored or played:\n" + "\n".join(details))
    for rank in (rank for rank in range(size) if rank not in final):
        own = stack_of(rank)
        if own:
            parts.append(f"rank {rank} gave no answer; stacks dumped without Python's lock:\n{own.rstrip()}")
    parts += _grouped(statuses, final)
    return headline(verdict, statuses), table, "\n\n".join(parts)


def _row(rank: int, status: RankStatus | None, answered: bool) -> tuple[str, ...]:
    if status is None:
        return (str(rank), "?", "?", "?", "?", "no status yet", "", "never")
    ago = "now" if answered else f"{max(0.0, time.time() - status['at']):.0f} s ago"
    return (
        str(rank), status["host"], str(status["pid"]), str(status["step"]), f"{status['number']} {status['call']}", doing_text(status),
        f"{status['seconds']:.0f}", ago,
    )  # fmt: skip


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def grouped_table(statuses: Mapping[int, RankStatus]) -> str:
    """One line per group of ranks with the same activity; for jobs of many ranks."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, status in statuses.items():
        doing = " > ".join(what for _, what, _ in status["doing"])
        groups.setdefault((str(status["step"]), f"{status['number']} {status['call']}", doing), []).append(rank)
    rows = [(ranks_text(ranks), *key) for key, ranks in groups.items()]
    return _table([("ranks", "step", "call", "activity"), *rows])


def _grouped(statuses: Mapping[int, RankStatus], final: Mapping[int, RankStatus]) -> list[str]:
    """Each distinct stack once, with its ranks; fewest ranks first, which is usually where the fault is."""
    groups: dict[tuple[bool, str, tuple[str, ...]], list[int]] = {}
    for rank, status in statuses.items():
        for thread, calls in status["stacks"].items():
            groups.setdefault((rank not in final, thread, tuple(calls)), []).append(rank)
    order = sorted(groups, key=lambda key: (key[1] != "MainThread", not key[0], len(groups[key]), groups[key]))
    return [
        f"rank {ranks_text(groups[key])}, {key[1]}{' (last statuses)' if key[0] else ''}:\n"
        + "\n".join(f"    {call}" for call in key[2])
        for key in order
    ]


def write_report_file(folder: Path, text: str) -> Path:
    """Write a report to a new file named by the time. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d_%H%M%S", time.gmtime())
    for number in range(100):
        path = folder / (f"{name}.txt" if not number else f"{name}_{number}.txt")
        try:
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
        except FileExistsError:
            continue
    return path
