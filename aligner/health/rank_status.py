"""What a rank says of itself when a job has to end, and the one report that is made of all ranks' words."""

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

Statement = dict[str, Any]
"""One rank's: rank, host, pid, step, number, call, doing, seconds, details, stacks and `at` (time.time())."""
FOLDER = "faults"
"""Of a run, where reports are written."""
SHORT = 300
"""Longest text of a sample that is shown, in characters."""
CONSOLE_RANKS = 32
"""Of more ranks the console shows groups; the file always shows each."""
OWN_THREAD = "aligner-watch"


def statement(
    rank: int, journal: Journal, activity: Activity, whole: bool = True, error: BaseException | None = None
) -> Statement:
    """This rank's; called beside the main thread.

    Args:
        error: that has ended the main thread's work: its stack is shown in place of the present one.
        whole: all threads' stacks with their source lines; else the main thread's places only, which takes microseconds.
    """
    chain, call = activity.chain(), journal.calls[-1]
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": journal.step,
        "number": call.number,
        "call": call.what,
        "doing": [[one.kind, one.what, [*one.ranks]] for one in chain[1:] or chain],
        "seconds": time.monotonic() - chain[-1].since,
        "details": _details(activity, whole),
        "stacks": _stacks(error) if whole else {"MainThread": _places(_main_frame())},
        "at": time.time(),
    }


def _details(activity: Activity, whole: bool) -> list[str]:
    found: list[str] = []
    for name, tell in list(activity.details.items()):
        try:
            found += tell()
        except Exception as error:  # it looks at another thread's objects while these change
            found.append(f"{name}: not known ({error!r})")
    return found if whole else [line[:SHORT] for line in found[:4]]


def shortened(text: str) -> str:
    """A prompt or response in one line."""
    line = repr(text)
    return (
        line if len(line) <= SHORT else f"{line[: SHORT * 2 // 3]} [...] {line[-SHORT // 3 :]} ({len(text)} characters)"
    )


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _places(frame: FrameType | None) -> list[str]:
    """The innermost calls, without reading a source file."""
    found: list[str] = []
    while frame is not None and len(found) < 25:
        code = frame.f_code
        found.insert(0, f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return found


def _stacks(error: BaseException | None) -> dict[str, list[str]]:
    """Thread -> its calls, outermost first; the main thread first, the watch left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    found = {}
    for ident in sorted(frames, key=lambda ident: (ident != main, names.get(ident, ""), ident)):
        name = names.get(ident, f"thread {ident}")
        if name == OWN_THREAD:
            continue
        of_error = error is not None and ident == main
        calls = (
            traceback.extract_tb(error.__traceback__) if error and of_error else traceback.extract_stack(frames[ident])
        )
        name = name if name not in found else f"{name} ({ident})"
        found[name] = [f"{one.filename}:{one.lineno} {one.name}: {one.line or ''}" for one in calls]
        found[name] += [f"{type(error).__name__}: {str(error)[:SHORT]}"] if of_error else []
    return found


def ranks_text(ranks: Iterable[int]) -> str:
    """0-3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def doing_text(said: Statement) -> str:
    """policy.update > waits for values of rank 3."""
    words = []
    for kind, what, ranks in said["doing"]:
        of = f" of rank {ranks_text(ranks)}" if ranks else ""
        words.append(f"waits for {what}{of}" if kind == "wait" else what)
    return " > ".join(words)


def place_text(said: Statement | None) -> str:
    """at step 3, call 17: policy.update."""
    return f"step {said['step']}, call {said['number']}: {said['call']}" if said else "a place that nobody knows"


def headline(verdict: Verdict, said: Mapping[int, Statement]) -> str:
    """The cause, and the rank that it is."""
    first, ranks = verdict["ranks"][0], verdict["ranks"]
    who = f"rank {first}" if len(ranks) == 1 else f"ranks {ranks_text(ranks)}"
    one = said.get(first)
    process = f" (process {one['pid']} on {one['host']})" if one else ""
    at = f"at {place_text(one)}; in {doing_text(one)}" if one else "before it had said anything"
    # what a rank told last may be a second old, and short calls have gone by since
    others = [other for rank, other in said.items() if rank not in ranks]
    ahead = max(others, key=lambda other: int(other["number"]), default=None)
    beside = f"; others are at {place_text(ahead)}" if ahead else ""
    is_, has = ("is", "has") if len(ranks) == 1 else ("are", "have")
    if verdict["kind"] == "dead":
        return (
            f"{who} died{process if len(ranks) == 1 else ''}: killed, or ended by itself; last seen {at}"
            f"{beside}.{_killer(said)}"
        )
    if verdict["kind"] == "stopped":
        return f"{who} {is_} stopped{process}, for {verdict['seconds']:.0f} s (SIGSTOP, or a debugger) {at}{beside}."
    if verdict["kind"] == "silent":
        return (
            f"{who} {has} been silent for {verdict['seconds']:.0f} s (hang.dead_seconds){process} {at}{beside}. Either the host is "
            "gone or frozen, or a computation keeps Python's lock."
        )
    if verdict["kind"] == "hang":
        return (
            f"{who} {has} made no progress for {verdict['seconds']:.0f} s (hang.after_seconds, hang.setup_seconds) {at}, "
            f"for {one['seconds'] if one else 0:.0f} s."
        )
    return f"{who}: {verdict.get('message', verdict['kind'])}"


def _killer(said: Mapping[int, Statement]) -> str:
    kills = max((one.get("kills", 0) for one in said.values()), default=0)
    return f" The kernel has killed {kills} process(es) here for memory since the job began." if kills else ""


def report(
    verdict: Verdict,
    said: Mapping[int, Statement],
    heard: Mapping[int, Statement],
    size: int,
    stack_of: Callable[[int], str] = lambda rank: "",
) -> tuple[str, str, str]:
    """(headline, table, samples and stacks) of the job.

    Args:
        said: whole statements, of the ranks that gave one.
        heard: what ranks told in passing, before.
        stack_of: what a rank's own C thread has written of it, if anything.
    """
    known = {**heard, **said}
    rows = [_row(rank, known.get(rank), rank in said) for rank in range(size)]
    table = _table([("rank", "host", "pid", "step", "call", "what it does, and with whom", "s in it", "heard"), *rows])
    parts = []
    details = [f"  rank {rank}: {line}" for rank in range(size) for line in known.get(rank, {}).get("details", [])]
    if details:
        parts.append("Being scored:\n" + "\n".join(details))
    for rank in (rank for rank in range(size) if rank not in said):
        own = stack_of(rank)
        if own:
            parts.append(f"rank {rank} gave no answer; written beside Python's lock:\n{own.rstrip()}")
    parts += _grouped(known, said)
    return headline(verdict, known), table, "\n\n".join(parts)


def _row(rank: int, said: Statement | None, answered: bool) -> tuple[str, ...]:
    if said is None:
        return (str(rank), "?", "?", "?", "?", "said nothing yet", "", "never")
    ago = "now" if answered else f"{max(0.0, time.time() - said['at']):.0f} s ago"
    return (
        str(rank), said["host"], str(said["pid"]), str(said["step"]), f"{said['number']} {said['call']}", doing_text(said),
        f"{said['seconds']:.0f}", ago,
    )  # fmt: skip


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def grouped_table(known: Mapping[int, Statement]) -> str:
    """One line for all ranks that do the same; for jobs of many ranks."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, said in known.items():
        doing = " > ".join(what for _, what, _ in said["doing"])
        groups.setdefault((str(said["step"]), f"{said['number']} {said['call']}", doing), []).append(rank)
    rows = [(ranks_text(ranks), *key) for key, ranks in groups.items()]
    return _table([("ranks", "step", "call", "what they do"), *rows])


def _grouped(known: Mapping[int, Statement], said: Mapping[int, Statement]) -> list[str]:
    """Every stack once, with all that stand there; fewest ranks first, for that is where the fault is."""
    groups: dict[tuple[bool, str, tuple[str, ...]], list[int]] = {}
    for rank, one in known.items():
        for thread, calls in one["stacks"].items():
            groups.setdefault((rank not in said, thread, tuple(calls)), []).append(rank)
    order = sorted(groups, key=lambda key: (key[1] != "MainThread", not key[0], len(groups[key]), groups[key]))
    return [
        f"rank {ranks_text(groups[key])}, {key[1]}{' (as last told)' if key[0] else ''}:\n"
        + "\n".join(f"    {call}" for call in key[2])
        for key in order
    ]


def write_report(folder: Path, text: str) -> Path:
    """A file of its own, by the time."""
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
