"""The fault report of a job: collect the ranks' statuses from the store, write them to a file and the console."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from aligner.health import rank_status
from aligner.health.crash_stacks import stack_file
from aligner.health.heartbeat import Verdict
from aligner.health.rank_status import RankStatus

LOST = re.compile(
    r"closed by (remote )?peer|connection (reset|closed|refused)|broken pipe|ncclRemoteError|"
    r"gloo.*(read|write|socket) error",
    re.IGNORECASE | re.DOTALL,
)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error (or one of its causes) only means that another rank closed its connection."""
    while error is not None:
        if isinstance(error, (RuntimeError, ConnectionError)) and LOST.search(str(error)):
            return True
        error = error.__cause__
    return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll a condition ten times a second, for at most `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)


def collect(
    store: dist.Store, size: int, without: set[int], seconds: float
) -> tuple[dict[int, RankStatus], dict[int, RankStatus]]:
    """(final statuses published within `seconds`, last periodic statuses), by rank.

    Args:
        size: number of ranks.
        without: ranks that are not waited for (dead ones).
    """
    keys = [f"status/{rank}" for rank in range(size) if rank not in without]
    wait_until(lambda: store.check(keys), seconds)
    final, last_known = (
        {rank: json.loads(store.get(f"{kind}/{rank}")) for rank in range(size) if store.check([f"{kind}/{rank}"])}
        for kind in ("status", "brief")
    )
    return final, last_known


def write_fault_report(
    verdict: Verdict,
    final: Mapping[int, RankStatus],
    last_known: Mapping[int, RankStatus],
    size: int,
    folder: Path | None,
    error: str,
    hide: Callable[[str], str] = str,
) -> None:
    """Write the full report to a file in `folder` and a shorter one to the console.

    Args:
        final, last_known: see `rank_status.report_text`.
        size: number of ranks.
        error: traceback of a rank that failed by an exception; "" if there is none.
        hide: masks secrets in both.
    """

    def stack_of(rank: int) -> str:
        with contextlib.suppress(OSError):
            return stack_file(folder, rank).read_text(errors="replace") if folder is not None else ""
        return ""

    headline, table, rest = rank_status.report_text(verdict, final, last_known, size, stack_of)
    if verdict["kind"] == "failed":
        head = f"aligner: error on rank {verdict['ranks'][0]}: {verdict['message']}"
    elif verdict["kind"] == "lockstep":
        head = _lockstep(verdict["number"], final, size)
    else:
        head = f"aligner: error: {headline}"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    full_text = f"{head}\n\n{when}, {size} rank(s)\n\n{table}\n\n{rest}\n"
    if error:
        full_text += f"\nThe error on rank {verdict['ranks'][0]}:\n{error}"
    statuses = {**last_known, **final}
    console_table = table if size <= rank_status.CONSOLE_RANKS else rank_status.grouped_table(statuses)
    if verdict["kind"] == "failed":
        text = f"{head}\n{error}" + (f"{console_table}\n" if error else "")
    else:
        text = f"{head}\n\n{console_table}\n\n{_main_threads(rest)}\n"
    if folder is not None:
        try:
            text += f"report: {rank_status.write_report_file(folder, hide(full_text))}\n"
        except OSError as problem:
            text += f"(the report could not be written to {folder}: {problem})\n"
    sys.stderr.write(hide(text))
    sys.stderr.flush()


def _main_threads(rest: str) -> str:
    """Keep only main threads' stacks; the file has the others."""
    parts = rest.split("\n\n")
    return "\n\n".join(part for part in parts if not part.startswith("rank ") or "MainThread" in part.partition("\n")[0]
                       or "gave no answer" in part)  # fmt: skip


def _lockstep(number: int, final: Mapping[int, RankStatus], size: int) -> str:
    calls: dict[str, list[int]] = {}
    for rank in range(size):
        status = final.get(rank)
        now = f"call {status['number']}: {status['call']} (step {status['step']})" if status else "unknown"
        calls.setdefault((status or {}).get("there") or f"nothing yet; last {now}", []).append(rank)
    lines = [f"  rank(s) {', '.join(map(str, ranks))}: {what}" for what, ranks in calls.items()]
    return (
        f"aligner: error: ranks are not in lockstep since role call {number}:\n" + "\n".join(lines) + "\n"
        "Every rank must issue the same role calls; look for a branch on a value that differs between ranks "
        "(bring it to every rank with ref.gather() first)."
    )


def report_alone(
    status: RankStatus, error: str, gone: list[int], speaker: int, folder: Path | None, hide: Callable[[str], str] = str
) -> None:
    """Report without the store: each rank writes its own status, and one per host prints it.

    Args:
        status: this rank's.
        error: how the store was lost.
        gone: ranks on this host whose processes have ended.
        speaker: the rank of this host that prints.
    """
    rank = status["rank"]
    why = (
        f"rank {rank_status.ranks_text(gone)} on this host died"
        if gone
        else "its launcher, or the first host, has ended"
    )
    head = f"aligner: error: rank {rank} lost the job's store ({why}; {error}); it was at {rank_status.place_text(status)}."
    text = f"{head}\n\n{rank_status.report_text({'kind': 'alone', 'ranks': [rank]}, {rank: status}, {}, rank + 1)[2]}\n"
    if folder is not None:
        with contextlib.suppress(OSError):
            head += f" Its stacks: {rank_status.write_report_file(folder / f'rank{rank:05d}', hide(text))}"
    if rank == speaker:
        sys.stderr.write(hide(f"{head}\n"))
        sys.stderr.flush()
