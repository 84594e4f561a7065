"""Several programs on the same work, started in turn: A B C A B C ..., their steps' seconds kept, compared, written down.

What disturbs the machine for a while disturbs every side. Measurements accumulate in a JSON file
{case: {side: [run, ...]}}, a run being {"steps": [{phase: seconds}, ...], ...}, so that a table can be measured in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Run = dict[str, Any]
Results = dict[str, dict[str, list[Run]]]
OURS = "aligner"


def environment(threads: int) -> dict[str, str]:
    """Of a process that may use this many threads, as launch/environment.sh sets it."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": paths,
    }  # fmt: skip


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that `run_all` ends what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def torchrun(processes: int, program: Sequence[str]) -> list[str]:
    """The command of `processes` ranks."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program,
    ]  # fmt: skip


def run_all(commands: Sequence[Sequence[str]], threads: int, limit: float, log: Path) -> None:
    """Run commands at the same time, each in a session of its own, so that one over the limit goes with its children.

    Raises RuntimeError with the end of the log where one fails, or takes more than `limit` seconds.
    """
    end = time.monotonic() + limit
    with log.open("w") as out:
        running = [
            subprocess.Popen(
                command,
                env=environment(threads),
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command in commands
        ]
        try:
            codes = [process.poll() for process in running]
            while None in codes and not any(codes) and time.monotonic() < end:
                time.sleep(0.1)
                codes = [process.poll() for process in running]
        finally:
            late = [process for process in running if process.poll() is None]
            for process in late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if any(codes) or None in codes:
        what = "failed" if any(codes) else f"took more than {limit:.0f} s"
        raise RuntimeError(f"{' '.join(map(str, commands[0][:8]))} ... {what}:\n{log.read_text()[-4000:]}")


class PeerRuns:
    """Runs of peers' programs in one folder: `NAME_PROGRAM.py SPEC.json` beside the benchmark, which writes its `Run` where the
    spec's "out" says."""

    def __init__(self, work: Path, benchmark: str, limit: float) -> None:
        self.work, self.benchmark, self.limit, self.runs = work, benchmark, limit, 0

    def folder(self, name: str) -> Path:
        """A path for the next run, with nothing there."""
        self.runs += 1
        return self.work / f"{name}{self.runs}"

    def trl(self, spec: Mapping[str, Any], processes: int, threads: int) -> Run:
        """TRL's trainer, under torchrun where it has several processes."""
        path = self._written("trl", spec)
        command = [self._program("trl"), str(path)]
        whole = [sys.executable, *command] if processes == 1 else torchrun(processes, command)
        return self._run([whole], threads, path)

    def bare(self, spec: Mapping[str, Any], processes: int, threads: int) -> Run:
        """No framework: processes that meet at a port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = self._written("bare", {**spec, "processes": processes, "port": port})
        commands = [[sys.executable, self._program("bare"), str(path), str(rank)] for rank in range(processes)]
        return self._run(commands, threads, path)

    def _program(self, peer: str) -> str:
        return str(Path(__file__).with_name(f"{self.benchmark}_{peer}.py"))

    def _written(self, name: str, spec: Mapping[str, Any]) -> Path:
        folder = self.folder(name)
        path = folder.with_suffix(".json")
        path.write_text(json.dumps({**spec, "folder": str(folder), "out": f"{folder}_out.json"}))
        return path

    def _run(self, commands: Sequence[Sequence[str]], threads: int, spec: Path) -> Run:
        run_all(commands, threads, self.limit, spec.with_suffix(".log"))
        run: Run = json.loads(Path(json.loads(spec.read_text())["out"]).read_text())
        return run


def rows_of_steps(run_dir: Path, first: int) -> list[tuple[dict[str, Any], float]]:
    """(metrics, seconds since the row before) of a job's steps after `first`. `seconds` of a row leaves out what is logged."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["step"] >= first]
    return [(row, row["time"] - before["time"]) for before, row in pairwise(measured)]


def alternate(
    results: Results,
    case: str,
    sides: Mapping[str, Callable[[], Run]],
    rounds: int,
    keep: Callable[[], None],
) -> None:
    """Run every side of a case in turn, `rounds` times; a side that fails is left out from there on, and says why."""
    found = results.setdefault(case, {})
    failed: set[str] = set()
    for number in range(rounds):
        for name, run in sides.items():
            if name in failed:
                continue
            try:
                made = run()
            except RuntimeError as error:
                failed.add(name)
                print(f"{case}, {name}: {error}", file=sys.stderr, flush=True)
                continue
            found.setdefault(name, []).append(made)
            print(f"{case}, {name}, round {number + 1}: {median(found[name][-1:], 'step'):.3f} s a step", flush=True)
            keep()


def median(runs: Sequence[Run], phase: str) -> float:
    """Of the steps of all runs."""
    return statistics.median(step[phase] for run in runs for step in run["steps"])


def spread(runs: Sequence[Run], phase: str) -> tuple[float, float]:
    """The middle half of the steps of all runs."""
    values = sorted(step[phase] for run in runs for step in run["steps"])
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def rate(runs: Sequence[Run], count: str) -> float:
    """`count` (such as "tokens") a second: the median over all steps."""
    return statistics.median(step[count] / step["step"] for run in runs for step in run["steps"])


def table(results: Results, phases: Sequence[str], count: str) -> str:
    """A row for each side of each case, as Markdown. The last column: how our tokens a second compare.

    Args:
        phases: medians of their seconds are shown, beside "step".
        count: what a second's worth is shown of.
    """
    head = ["work", "side", *phases, "step", "middle half", f"{count}/s", "aligner is"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for case, sides in results.items():
        for name, runs in sorted(sides.items(), key=lambda side: (side[0] != OURS, side[0])):
            low, high = spread(runs, "step")
            ratio = (
                ""
                if name == OURS or OURS not in sides
                else f"{rate(sides[OURS], count) / rate(runs, count):.2f}x as fast"
            )
            shown = [figure(median(runs, phase)) if phase in runs[0]["steps"][0] else "-" for phase in phases]
            cells = [
                case if name == OURS or OURS not in sides else "",
                name,
                *shown,
                f"**{figure(median(runs, 'step'))}**",
            ]
            cells += [f"{figure(low)} to {figure(high)}", f"{rate(runs, count):,.0f}", ratio]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(seconds: float) -> str:
    """Three digits."""
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def read_results(path: Path | None) -> Results:
    """What a file holds so far."""
    if path is None or not path.exists():
        return {}
    found: Results = json.loads(path.read_text())
    return found


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- NAME --> and <!-- end of NAME -->.

    Raises ValueError where the markers are missing.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    whole = path.read_text()
    if begin not in whole or end not in whole.split(begin, 1)[1]:
        raise ValueError(f"{path} has no lines {begin.strip()} and {end}; write them where the results are to stand.")
    before, rest = whole.split(begin, 1)
    path.write_text(f"{before}{begin}{text}\n{end}{rest.split(end, 1)[1]}")


def benchmark(
    arguments: Sequence[str],
    *,
    name: str,
    description: str | None,
    case_of: Callable[[str], Any],
    cases: Sequence[Any],
    quick: Any,
    sides: Sequence[str],
    bench: Callable[[Any, int, Path, Sequence[str]], Any],
    report: Callable[[Results], str],
) -> int:
    """The command of a benchmark: measure its cases, and print or write the table.

    Args:
        name: of the file, as the table's markers have it.
        case_of: reads one of --cases; a case has a `name`.
        cases: by default.
        quick: the case of --quick.
        bench: (case, steps, folder, settings of our jobs) -> what has `sides(names)`, the run of each side.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", type=case_of, default=cases)
    parser.add_argument("--sides", nargs="+", choices=sides, default=["aligner", "trl", "trl-2", "bare"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each run, after two that are not counted")
    parser.add_argument("--quick", action="store_true", help=f"{quick.name}, one round of aligner, trl-2 and bare")
    parser.add_argument("--json", type=Path, help="add to what this file holds")
    parser.add_argument("--write", type=Path, help="replace the table in this file, between its markers")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of our jobs")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    if options.quick:
        options.cases, options.sides, options.rounds = [quick], ["aligner", "trl-2", "bare"], 1
    results = read_results(options.json)

    def keep() -> None:
        if options.json:
            options.json.write_text(json.dumps(results))

    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            runs = bench(case, options.steps, Path(folder), options.set).sides(options.sides)
            alternate(results, case.name, runs, options.rounds, keep)
    text = report(results)
    print(text)
    if options.write:
        write_between(options.write, name, text)
    return 0
