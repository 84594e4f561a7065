"""The training engines beside each other: time of an update, memory of a rank, time of a weight sync into vLLM.

python tools/bench/engines.py [--cases 9.8M/1 55M/2 ...] [--steps 4] [--json runs/engines.json] [--write docs/engines.md]

A case is SIZE/RANKS. An update is one optimizer step of supervised fine-tuning in float32 on rows of 128 tokens, a quarter of them the
prompt, one thread a rank. All engines of a case are in one process on each rank and take turns; seconds are medians of the slowest rank,
without the first round, and beside them those of its processor, which say less of waiting and more on a busy machine. A sync brings the policy's weights into a vLLM engine on each rank, proof included. Memory is the peak
of a process that has one engine alone, over its first two updates, beyond what it holds with all libraries imported: of the rank with the
most, the median of three processes, since it depends on how the allocator's heap happens to lie. The ratio beside a figure is to the better engine's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import alternation  # noqa: E402
import workloads  # noqa: E402

ENGINES = ("megatron", "fsdp")
ROWS = {"9.8M": 32, "55M": 8}
"""Of an update, by the model's size."""
CASES = tuple(f"{size}/{ranks}" for size in ROWS for ranks in (1, 2))
MEMORY_RUNS = 3
LIMIT = 600.0
"""Seconds of one program, at most."""
MEASURED = ("update", "memory", "sync")
FIGURES = {"update": "update, s", "cpu": "of the CPU, s", "memory": "memory, MiB", "sync": "sync into vLLM, ms"}
"""The figures, with the titles of their columns; `cpu` comes with `update`."""
Found = dict[str, dict[str, float]]
"""figure -> engine -> value."""


def measure(case: str, steps: int, what: Sequence[str]) -> Found:
    """The figures of one case."""
    size, ranks = case.split("/")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        workloads.write_model(work / "model", workloads.SIZES[size])
        job = {"model": str(work / "model"), "rows": ROWS[size], "steps": steps}
        found: Found = {}
        timed = [name for name in ("update", "sync") if name in what]
        if timed:
            run = _run(work, int(ranks), {**job, "engines": ENGINES, "what": timed})
            found |= run
        if "memory" in what:
            peaks: dict[str, list[float]] = {name: [] for name in ENGINES}
            for name in ENGINES * MEMORY_RUNS:
                run = _run(work, int(ranks), {**job, "engines": [name], "what": ["memory"]})
                peaks[name].append(run["memory"][name])
            found["memory"] = {name: statistics.median(values) for name, values in peaks.items()}
    return found


def _run(work: Path, ranks: int, job: Mapping[str, Any]) -> Found:
    spec, out = work / "job.json", work / "out.json"
    spec.write_text(json.dumps({**job, "out": str(out)}))
    program = [str(Path(__file__).with_name("engines_rank.py")), str(spec)]
    alternation.run_all([alternation.torchrun(ranks, program)], 1, LIMIT, work / "job.log")
    found: Found = json.loads(out.read_text())
    return found


def table(results: Mapping[str, Found]) -> str:
    """Markdown: a row for each case, a column for each engine and figure that there is."""
    measured = [name for name in FIGURES if any(name in found for found in results.values())]
    titles = [f"{FIGURES[name]}: {engine}" for name in measured for engine in ENGINES]
    lines = [["parameters", "ranks", "rows", *titles]]
    lines.append(["---"] * len(lines[0]))
    for case, found in results.items():
        size, ranks = case.split("/")
        cells = [cell(found.get(name, {}), engine, name) for name in measured for engine in ENGINES]
        lines.append([size, ranks, str(ROWS[size]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(values: Mapping[str, float], engine: str, figure: str) -> str:
    """A figure, and where another engine's is lower how many times as much it is."""
    if engine not in values:
        return ""
    value, best = values[engine], min(values.values())
    shown = (
        alternation.figure(value) if figure in ("update", "cpu") else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    )
    return shown if value == best else f"{shown} ({value / best:.2f}x)"


def main(arguments: Sequence[str]) -> int:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--steps", type=int, default=4, help="updates, and syncs, that count")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="FIGURE")
    parser.add_argument("--json", type=Path, help="add to what this file holds")
    parser.add_argument("--write", type=Path, help="replace the table in this file, between its markers")
    options = parser.parse_args(arguments)
    alternation.end_on_sigterm()
    held = options.json and options.json.exists()
    results: dict[str, Found] = json.loads(options.json.read_text()) if held else {}
    for case in options.cases:
        results.setdefault(case, {}).update(measure(case, options.steps, options.only))
        print(case, results[case], file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    text = table({case: results[case] for case in CASES if case in results})
    print(text)
    if options.write:
        alternation.write_between(options.write, "tools/bench/engines.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
