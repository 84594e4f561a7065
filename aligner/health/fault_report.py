"""The last report of a job: collected from the store, written to a file and the console."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from aligner.health import rank_status as doctor
from aligner.health.crash_stacks import stack_file
from aligner.health.heartbeat import Verdict
from aligner.health.rank_status import Statement

LOST = re.compile(
    r"closed by (remote )?peer|connection (reset|closed|refused)|broken pipe|ncclRemoteError|"
    r"gloo.*(read|write|socket) error",
    re.IGNORECASE | re.DOTALL,
)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error only says that another rank's end of a connection is gone."""
    while error is not None:
        if isinstance(error, (RuntimeError, ConnectionError)) and LOST.search(str(error)):
            return True
        error = error.__cause__
    return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Ask ten times a second, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)


def collect(
    store: dist.Store, size: int, without: set[int], seconds: float
) -> tuple[dict[int, Statement], dict[int, Statement]]:
    """(statements that ranks gave within `seconds`, what ranks had told before), by rank.

    Args:
        without: ranks that nobody waits for.
    """
    wanted = [f"said/{rank}" for rank in range(size) if rank not in without]
    wait_until(lambda: store.check(wanted), seconds)
    said, heard = (
        {rank: json.loads(store.get(f"{kind}/{rank}")) for rank in range(size) if store.check([f"{kind}/{rank}"])}
        for kind in ("said", "heard")
    )
    return said, heard


def publish(
    verdict: Verdict,
    said: Mapping[int, Statement],
    heard: Mapping[int, Statement],
    size: int,
    folder: Path | None,
    error: str,
    hide: Callable[[str], str] = str,
) -> None:
    """The file, and what fits the console.

    Args:
        error: the traceback of a rank that failed by an exception.
        hide: takes secrets out of both.
    """

    def stack_of(rank: int) -> str:
        with contextlib.suppress(OSError):
            return stack_file(folder, rank).read_text(errors="replace") if folder is not None else ""
        return ""

    headline, table, rest = doctor.report(verdict, said, heard, size, stack_of)
    if verdict["kind"] == "failed":
        head = f"aligner: error on rank {verdict['ranks'][0]}: {verdict['message']}"
    elif verdict["kind"] == "lockstep":
        head = _lockstep(verdict["number"], said, size)
    else:
        head = f"aligner: error: {headline}"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    whole = f"{head}\n\n{when}, {size} rank(s)\n\n{table}\n\n{rest}\n"
    if error:
        whole += f"\nThe error on rank {verdict['ranks'][0]}:\n{error}"
    known = {**heard, **said}
    shown = table if size <= doctor.CONSOLE_RANKS else doctor.grouped_table(known)
    if verdict["kind"] == "failed":
        text = f"{head}\n{error}" + (f"{shown}\n" if error else "")
    else:
        text = f"{head}\n\n{shown}\n\n{_main_threads(rest)}\n"
    if folder is not None:
        try:
            text += f"report: {doctor.write_report(folder, hide(whole))}\n"
        except OSError as problem:
            text += f"(the report could not be written to {folder}: {problem})\n"
    sys.stderr.write(hide(text))
    sys.stderr.flush()


def _main_threads(rest: str) -> str:
    """Without the stacks of other threads, which the file has."""
    parts = rest.split("\n\n")
    return "\n\n".join(part for part in parts if not part.startswith("rank ") or "MainThread" in part.partition("\n")[0]
                       or "gave no answer" in part)  # fmt: skip


def _lockstep(number: int, said: Mapping[int, Statement], size: int) -> str:
    ways: dict[str, list[int]] = {}
    for rank in range(size):
        one = said.get(rank)
        now = f"call {one['number']}: {one['call']} (step {one['step']})" if one else "unknown"
        ways.setdefault((one or {}).get("there") or f"nothing yet; last {now}", []).append(rank)
    lines = [f"  rank(s) {', '.join(map(str, ranks))}: {what}" for what, ranks in ways.items()]
    return (
        f"aligner: error: ranks are not in lockstep since role call {number}:\n" + "\n".join(lines) + "\n"
        "Every rank must issue the same role calls; look for a branch on a value that differs between ranks "
        "(bring it to every rank with ref.gather() first)."
    )


def alone(
    mine: Statement, error: str, gone: list[int], speaker: int, folder: Path | None, hide: Callable[[str], str] = str
) -> None:
    """Without the store no rank hears of another: each writes of itself, and one of each host speaks."""
    rank = mine["rank"]
    why = f"rank {doctor.ranks_text(gone)} on this host died" if gone else "its launcher, or the first host, has ended"
    head = f"aligner: error: rank {rank} lost the job's store ({why}; {error}); it was at {doctor.place_text(mine)}."
    text = f"{head}\n\n{doctor.report({'kind': 'alone', 'ranks': [rank]}, {rank: mine}, {}, rank + 1)[2]}\n"
    if folder is not None:
        with contextlib.suppress(OSError):
            head += f" Its stacks: {doctor.write_report(folder / f'rank{rank:05d}', hide(text))}"
    if rank == speaker:
        sys.stderr.write(hide(f"{head}\n"))
        sys.stderr.flush()
