"""Fault injection: time from a fault to the report that names it, for each fault in a short GRPO job on 2 ranks.

python tools/bench/faults.py [--faults killed stopped ...] [--out DIR] [--settings KEY=VALUE ...]

The model is random, with 2 layers. A fault of the table below may change the job's settings or data before the start; what
happens during training is in faults_loop.py. Prints one line per fault: seconds until the report, until all processes have
ended, and the report's first line. Exits with 1 if a report is missing, names another cause, or takes more than 60 s. A
damaged checkpoint or a full disk must only give a warning, and the job must continue.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.data.column_addition import ColumnAddition, ModelShape, write_task

ROOT = Path(__file__).resolve().parent.parent.parent
PROMISE = 60.0
LIMIT = 240.0
AT = "ALIGNER_FAULT"
OWN = Path(__file__).with_name("faults_loop.py")


@dataclass(frozen=True)
class Fault:
    """A fault, and the expected first line of the report."""

    what: str
    said: str
    """A regular expression."""
    settings: tuple[str, ...] = ()
    before: Callable[[Path], None] = lambda folder: None
    """Damages the job's files (model/, prompts.jsonl, ...) in its folder before the start."""
    file: bool = True
    """Whether the report is written to run_dir/faults; errors found before the job starts are not."""
    env: dict[str, str] = field(default_factory=dict)
    goes_on: bool = False
    """The job only warns and continues to its end."""
    small_disk: bool = False
    """Put checkpoints on a file system with room for one and a half (needs unshare and mount)."""


def spoil_line(folder: Path) -> None:
    """Truncate a line in the middle of the prompts."""
    lines = (folder / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    lines[30] = lines[30][: len(lines[30]) // 2] + b"\xff\xfe\n"
    (folder / "prompts.jsonl").write_bytes(b"".join(lines))


def damaged(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Run a job that leaves checkpoints and damage a file of the newest one, before it is resumed for two more steps."""

    def before(folder: Path) -> None:
        first_run = subprocess.run(
            launch(folder, ["checkpoint.every=2"]), env=environment(folder, ""), cwd=folder, capture_output=True
        )
        assert first_run.returncode == 0, first_run.stderr[-2000:]
        file = max((folder / "run" / "checkpoints").iterdir()) / "rank-00001.safetensors"
        file.write_bytes(damage(file.read_bytes()))

    return before


GOES_ON = ("checkpoint.every=2", "checkpoint.accept_changes=true", "train.steps=7")
FAULTS: dict[str, Fault] = {
    "killed": Fault("rank 1 killed (SIGKILL)", r"rank 1 died"),
    "first_killed": Fault("rank 0 killed (SIGKILL)", r"rank 0 died"),
    "stopped": Fault("rank 1 stopped (SIGSTOP)", r"rank 1 is stopped"),
    "first_stopped": Fault("rank 0 stopped (SIGSTOP)", r"rank 0 is stopped"),
    "lock_held": Fault("rank 1 keeps Python's lock for ever", r"rank 1 has been silent"),
    "asleep": Fault("rank 1 sleeps for ever", r"rank 1 has made no progress", ("hang.after_seconds=30",)),
    "skipped": Fault("rank 1 leaves out a role call", r"not in lockstep"),
    "reward_asleep": Fault(
        "the rule sleeps for ever",
        r"rows have no reward \(\d+ timeout\).*reward.timeout_s",
        ("reward.rule=own.sleeping", "reward.timeout_s=2"),
    ),
    "reward_memory": Fault(
        "the rule eats memory",
        r"rows have no reward \(\d+ failed\).*reward.memory_mib",
        ("reward.rule=own.eating", "reward.memory_mib=512", "reward.timeout_s=20"),
    ),
    "data": Fault("a broken line in the prompts' file", r"prompts.jsonl.*31", before=spoil_line, file=False),
    "engine": Fault(
        "vLLM fails in an engine step of rank 1", r"error on rank 1: RuntimeError: an engine step went wrong"
    ),
    "truncated": Fault(
        "a checkpoint's file is cut off",
        r"step-00000005 is damaged and skipped: .*rank-00001.safetensors has \d+ bytes",
        GOES_ON,
        damaged(lambda content: content[:-100]),
        file=False,
        goes_on=True,
    ),
    "flipped": Fault(
        "a bit of a checkpoint's file is flipped",
        r"step-00000005 is damaged and skipped: .*rank-00001.safetensors is damaged",
        GOES_ON,
        damaged(lambda content: content[:-100] + bytes([content[-100] ^ 4]) + content[-99:]),
        file=False,
        goes_on=True,
    ),
    "disk": Fault(
        "the disk is full in a save",
        r"checkpoint of step 4 could not be written: .*No space left on device.*last complete checkpoint is step-00000002",
        ("checkpoint.every=2",),
        file=False,
        goes_on=True,
        small_disk=True,
    ),
    "memory": Fault("rank 1 runs out of memory", r"error on rank 1: \w*(OutOfMemory|MemoryError)"),
}
"""Name -> fault; what happens in the loop or a rule is under the same name in `OWN`."""


@dataclass
class Outcome:
    """Result of one fault: seconds from the fault to the report, and to the end of the last process."""

    line: str = ""
    report_s: float = float("nan")
    end_s: float = float("nan")
    ok: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Run the faults; returns 0 if all are reported in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("--settings", nargs="*", default=[], help="for every job")
    args = parser.parse_args(arguments)
    out = args.out or Path(tempfile.mkdtemp(prefix="faults"))
    source = out / "source"
    shutil.rmtree(source, ignore_errors=True)
    shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
    write_task(source, ColumnAddition(demonstrations=8, prompts=64, heldout=16, preferences=8), shape)
    print("| fault | report after | all ended after | the report's first line |\n| --- | --- | --- | --- |", flush=True)
    bad = 0
    for name in args.faults:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        outcome = run(name, FAULTS[name], folder, args.settings)
        bad += not outcome.ok
        mark = "" if outcome.ok else " **unexpected**"
        print(
            f"| {FAULTS[name].what} | {outcome.report_s:.1f} s | {outcome.end_s:.1f} s | {outcome.line[:160]}{mark} |",
            flush=True,
        )
    if args.out is None:
        shutil.rmtree(out)
    return 1 if bad else 0


def run(name: str, fault: Fault, folder: Path, settings: list[str]) -> Outcome:
    """One job with one fault."""
    shutil.copyfile(OWN, folder / "own.py")
    fault.before(folder)
    command = launch(folder, [*fault.settings, *settings])
    if fault.small_disk:
        checkpoints = folder / "run" / "checkpoints"
        checkpoints.mkdir(parents=True)
        mounted = ["sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"', str(checkpoints)]
        command = ["unshare", "--map-root-user", "--mount", *mounted, *command]
    start = time.time()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder, name) | fault.env,
        cwd=folder,
    )
    lines: list[tuple[float, str]] = []
    readers = [threading.Thread(target=read, args=(pipe, lines)) for pipe in (process.stdout, process.stderr)]
    for reader in readers:
        reader.start()
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher kills its ranks 30 s later
        process.wait(60)
    end = time.time()
    for reader in readers:
        reader.join(30)
    (folder / "console.txt").write_text("".join(line for _, line in lines))
    return judge(fault, folder, lines, start, end, process.returncode)


def launch(folder: Path, settings: list[str]) -> list[str]:
    """The command of a job."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*torchrun, "-m", "aligner.main", *overrides(folder), *settings]


def environment(folder: Path, fault: str) -> dict[str, str]:
    """Environment of a job with this fault."""
    plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", AT: fault}
    return {**os.environ, **plain, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}


def overrides(folder: Path) -> list[str]:
    """A job of 5 steps whose loop is `own.faulty`."""
    return [
        "--config-name=quickstart", "algorithm._target_=own.faulty", f"model.path={folder / 'model'}",
        f"data.path={folder / 'prompts.jsonl'}", "data.eval_path=null", "reward.rule=own.digits",
        f"run_dir={folder / 'run'}", "reward.workers=1", "train.steps=5", "train.eval_every=0", "train.save=false",
        "train.report=false", "data.prompts_per_step=4", "algorithm.group_size=4", "sampling.max_tokens=20",
        "rollout.kv_cache_mib=16", "policy.micro_tokens=256", "policy.optimizer.warmup_steps=0",
    ]  # fmt: skip


def read(pipe: IO[str] | None, lines: list[tuple[float, str]]) -> None:
    """Lines with the time of their arrival."""
    assert pipe is not None
    for line in pipe:
        lines.append((time.time(), line))


def judge(fault: Fault, folder: Path, lines: list[tuple[float, str]], start: float, end: float, status: int) -> Outcome:
    """What came of it. The first mark of the fault counts: rules are called again and again."""
    marks = [float(found[1]) for _, line in lines if (found := re.search(r"FAULT ([\d.]+)", line))]
    at = min(marks, default=start)
    mark = "aligner: WARNING" if fault.goes_on else "aligner: error"
    report = next(((when, line) for when, line in lines if mark in line), None)
    if report is None:
        return Outcome("no report", end_s=end - at)
    files = list((folder / "run" / "faults").glob("*.txt"))
    text = " ".join((files[0].read_text() if files else "".join(line for _, line in lines)).split())
    in_time = report[0] - at < PROMISE and (status == 0 if fault.goes_on else end - at < PROMISE)
    named = re.search(fault.said, text) is not None and len(files) == fault.file
    return Outcome(report[1].strip().replace("aligner: ", "", 1), report[0] - at, end - at, in_time and named)


if __name__ == "__main__":
    sys.exit(main())
