"""What a step costs outside the engines: GRPO through the real loop, driver, roles and transfers, with null engines.

python tools/bench/overhead.py [--ranks 2 4 8 ...] [--batches fixed rows] [--placements colocated split] [--steps 5]
python tools/bench/overhead.py --job RUN_DIR...     the same of real jobs, from their timelines

Ranks are forked from this process, which has imported everything: 64 of them take some 4 GiB. On a machine with fewer
cores than ranks the wall time of a step is the sum of all ranks' work; `cpu a rank` is what a rank itself pays, which
is what a machine with a core for each rank would see, but for the wires.

  fixed     512 rows of up to 1,024 tokens in all, however many ranks
  rows      8 rows for each rank
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

import numpy as np

TOKENS = 1024
"""Longest row."""
FIXED_ROWS = 512
ROWS_A_RANK = 8
PARTS = ("generate", "score", "logprobs", "map", "update", "values", "end of the step", "other threads")


def run_case(ranks: int, rows: int, split: bool, steps: int, limit: float) -> list[dict[str, Any]]:
    """All ranks' measurements. Raises RuntimeError if a rank failed or the limit (seconds) passed; no process is left."""
    import overhead_rank

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:

        def rank_main(rank: int) -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # goes with its parent, whatever ends that
            overhead_rank.environment(rank, ranks, port)
            overhead_rank.run_rank(ranks, rows, TOKENS, split, steps, Path(folder))

        fork = multiprocessing.get_context("fork")
        gc.freeze()  # the collector would otherwise write to pages that the ranks share
        running = [fork.Process(target=rank_main, args=(rank,)) for rank in range(ranks)]
        for process in running:
            process.start()
        end = time.monotonic() + limit
        try:
            for process in running:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            late = [process for process in running if process.is_alive()]
            for process in late:
                process.kill()
                process.join()
        files = [Path(folder) / f"rank{rank}.json" for rank in range(ranks)]
        if late or not all(file.exists() for file in files):
            raise RuntimeError(f"{ranks} ranks, {rows} rows: {len(late)} ranks not done within {limit:.0f} s")
        return [json.loads(file.read_text()) for file in files]


def figures(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one case, a step: milliseconds of wall and CPU, messages; means over the measured steps."""
    count = len(found[0]["marks"]) - 1

    def spent(rank: Mapping[str, Any], name: str) -> float:
        return (rank["marks"][-1][name] - rank["marks"][0][name]) / count * 1e3

    def counted(rank: Mapping[str, Any], group: str, name: str) -> float:
        return (rank["marks"][-1][group].get(name, 0) - rank["marks"][0][group].get(name, 0)) / count

    cpu = [spent(rank, "cpu") for rank in found]
    names = {name for rank in found for name in rank["marks"][-1]["parts"]}
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for name in names:
        part = "map" if name.startswith("map(") else name
        parts[part] = parts.get(part, 0.0) + statistics.fmean(counted(rank, "parts", name) for rank in found) * 1e3
    parts["other threads"] = statistics.fmean(spent(rank, "cpu") - spent(rank, "main") for rank in found)
    return {
        "wall": statistics.median(
            [1e3 * (b["wall"] - a["wall"]) for a, b in zip(found[0]["marks"], found[0]["marks"][1:], strict=False)]
        ),
        "cpu": statistics.fmean(cpu),
        "cpu_most": max(cpu),
        "cpu_first": cpu[0],
        "parts": parts,
        "messages": statistics.fmean(counted(rank, "sent", "messages") for rank in found),
        "messages_most": max(counted(rank, "sent", "messages") for rank in found),
        "bytes": statistics.fmean(counted(rank, "sent", "bytes") for rank in found),
        "bytes_most": max(counted(rank, "sent", "bytes") for rank in found),
        "collectives": statistics.fmean(counted(rank, "sent", "collectives") for rank in found),
        "start_world": max(rank["start"]["world"] for rank in found),
        "start_groups": max(rank["start"]["groups"] for rank in found),
        "memory": sum(rank["memory"] for rank in found) / len(found),
    }


def fit(ranks: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """values ~ a/n + b + c log2 n + d n, none negative: least squares of relative errors, of the best few terms.

    1/n is what ranks share, log2 n what goes by trees, n what a rank does for each other one.
    """
    n = np.array(ranks, dtype=float)
    y = np.array(values, dtype=float)
    columns = {"/n": 1 / n, "": np.ones_like(n), "log2 n": np.log2(n), "n": n}
    best: tuple[float, dict[str, float]] = (float("inf"), {})
    for mask in range(1, 16):
        names = [name for i, name in enumerate(columns) if mask >> i & 1]
        a = np.stack([columns[name] / y for name in names], 1)
        coefficients, *_ = np.linalg.lstsq(a, np.ones_like(y), rcond=None)
        error = float(((a @ coefficients - 1) ** 2).sum()) + 1e-3 * len(names)  # of nearly equals the simpler
        if (coefficients >= 0).all() and error < best[0]:
            best = error, dict(zip(names, coefficients.tolist(), strict=True))
    return {name: best[1].get(name, 0.0) for name in columns}


def at(parts: Mapping[str, float], ranks: int) -> float:
    """The fit's value for a number of ranks."""
    return parts["/n"] / ranks + parts[""] + parts["log2 n"] * float(np.log2(ranks)) + parts["n"] * ranks


def table(name: str, cases: Mapping[int, Mapping[str, Any]]) -> str:
    """The table of one series over numbers of ranks."""
    lines = [
        f"{name}\n  ranks   wall ms   cpu ms a rank (most, rank 0)    messages (most)   KiB sent (most)  collectives"
        "   start s: world, groups"
    ]
    for ranks, case in cases.items():
        lines.append(
            f"  {ranks:5d} {case['wall']:9.1f} {case['cpu']:10.2f} ({case['cpu_most']:7.2f}, {case['cpu_first']:7.2f})"
            f"   {case['messages']:9.1f} ({case['messages_most']:5.0f})  {case['bytes'] / 1024:8.0f} "
            f"({case['bytes_most'] / 1024:6.0f})    {case['collectives']:9.1f}   {case['start_world']:6.1f},"
            f" {case['start_groups']:6.1f}"
        )
    lines.append("  cpu ms a rank by part: " + ", ".join(PARTS))
    for ranks, case in cases.items():
        rest = case["cpu"] - sum(case["parts"].values())
        shown = "  ".join(f"{part} {case['parts'][part]:.2f}" for part in PARTS)
        lines.append(f"  {ranks:5d} {shown}  rest {rest:.2f}")
    if len(cases) >= 3:
        for quantity, title in (("cpu", "cpu ms a rank"), ("cpu_first", "cpu ms of rank 0"), ("messages", "messages")):
            parts = fit(list(cases), [case[quantity] for case in cases.values()])
            words = " + ".join(
                f"{value:.3g}{'' if part == '/n' else ' '}{part}" for part, value in parts.items() if value
            )
            lines.append(f"  {title} ~ {words.strip()}; 1,024 ranks, an estimate: {at(parts, 1024):.0f}")
    return "\n".join(lines)


def job(run_dir: str) -> str:
    """Time by part of the steps of a real job, without the first two: means over ranks and steps."""
    from aligner.report.traces import LOOP, TRANSFER, read_spans, uses, whole_steps, window

    spans = read_spans(run_dir)
    steps = whole_steps(spans)[2:]
    kinds = {LOOP: "loop and driver", TRANSFER: "values between roles", "end of the step": "end of the step"}

    def kind_of(call: str, waited: bool) -> str:
        if call in kinds:
            return kinds[call]
        return "small functions (map)" if ".map(" in call else "waits for engines" if waited else "engines"

    spent: dict[str, float] = defaultdict(float)
    seconds = ranks = 0.0
    for step in steps:
        part = [span for span in spans if span.step == step]
        begin, end = window(part)
        seconds += end - begin
        used = uses(part)
        ranks = len(used)
        for use in used.values():
            for waited, results in ((False, use.calls), (True, use.waits)):
                for call, taken in results.items():
                    spent[kind_of(call, waited)] += taken / ranks
    overhead = sum(taken for kind, taken in spent.items() if "engines" not in kind)
    lines = [f"{run_dir}: {len(steps)} steps of {1e3 * seconds / len(steps):.0f} ms on {ranks:.0f} ranks"]
    lines += [f"  {kind:<24}{1e3 * taken / len(steps):9.2f} ms {taken / seconds:7.2%}" for kind, taken in spent.items()]
    return "\n".join(
        [*lines, f"  {'outside the engines':<24}{1e3 * overhead / len(steps):9.2f} ms {overhead / seconds:7.2%}"]
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--batches", nargs="+", choices=["fixed", "rows"], default=["fixed", "rows"])
    parser.add_argument("--placements", nargs="+", choices=["colocated", "split"], default=["colocated", "split"])
    parser.add_argument("--steps", type=int, default=5, help="measured, after 3 that are not")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one case, at most")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--job", nargs="+", metavar="RUN_DIR", help="runs with timelines (logging.timeline_steps)")
    options = parser.parse_args(arguments)
    if options.job:
        print("\n".join(job(run_dir) for run_dir in options.job))
        return 0
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    cases_by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for placement in options.placements:
        for batch in options.batches:
            name = f"{placement}, " + (f"{FIXED_ROWS} rows" if batch == "fixed" else f"{ROWS_A_RANK} rows a rank")
            cases_by_name[name] = {}
            for ranks in options.ranks:
                rows = FIXED_ROWS if batch == "fixed" else ROWS_A_RANK * ranks
                measurements = run_case(ranks, rows, placement == "split", options.steps, options.limit)
                cases_by_name[name][ranks] = figures(measurements)
            print(table(name, cases_by_name[name]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(cases_by_name, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
