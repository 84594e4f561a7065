"""Kill random ranks of a GRPO job at random times, also during saves: every run must end with the same results.

`python tools/bench/kill.py [--episodes] [--runs 50] [--seed 0] [--out DIR] [OVERRIDES...]`. One run is left alone; in each of
the others up to 3 ranks get SIGKILL, torchrun restarts the job, and it goes on from its newest whole checkpoint. Compared bit
by bit: weights, masters and moments of the last checkpoint, what the loop, the data and the random states were, every row of
metrics.jsonl but its times, and the tokens, log-probabilities and rewards of every step's samples. Half of the kills wait for a
checkpoint that is being written. Exit status 1 if any run differs.

`--episodes`: the job plays episodes of several turns, with environments that answer after random delays; partial rollouts leave
some of them open at every checkpoint (`stream.step_tokens`), and a batch is played ahead (`stream.lag=1`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.checkpoint.folder import complete
from aligner.data.column_addition import ColumnAddition, ModelShape, write_task
from aligner.report.sample_records import records_path

ROOT = Path(__file__).resolve().parent.parent.parent
RANKS, STEPS, KILLS = 2, 6, 3
LIMIT = 400.0
"""Seconds that a run may take."""
TIMES = (
    "time", "seconds", "tokens_per_second", "memory", "reshard_",
    "episodes/engine_idle", "episodes/environment_",
)  # fmt: skip
"""How the names of those metrics begin that say how fast it went."""
RULE = (
    "def digits(prompt, response, **fields):\n    return sum(c.isdigit() for c in response) / max(1, len(response))\n"
)
GAME = '''
import random, time

CLOCK = random.SystemRandom()


class Game:
    """Two to four turns, answered after a random delay; raises in one of nine."""

    def reset(self, row, seed):
        time.sleep(CLOCK.uniform(0, 0.05))
        self.value, self.turns, self.last = seed, 0, 2 + seed % 3
        return f"{seed % 97}:"

    def step(self, text):
        time.sleep(CLOCK.uniform(0, 0.05))
        self.turns += 1
        self.value = (self.value * 31 + sum(map(ord, text))) % 1009
        if self.value % 9 == 0:
            raise RuntimeError(f"after turn {self.turns}")
        digits = sum(letter.isdigit() for letter in text) / max(1, len(text))
        return str(self.value), digits, self.turns == self.last
'''
TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '=' }}{% endfor %}"
)


@dataclass
class Run:
    """One job and its kills."""

    folder: Path
    seconds: float = 0.0
    kills: list[str] = field(default_factory=list)
    """Each kill: the rank, seconds after the start, and whether a checkpoint was being written."""
    status: int | None = None
    output: str = ""
    """Of the launcher and all ranks."""


def make_task(folder: Path) -> Path:
    """Write a task, a two-layer model, a rule and a game."""
    if not folder.exists():
        shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
        write_task(folder, ColumnAddition(demonstrations=8, prompts=64, heldout=8, preferences=8), shape)
        for name, text in (("rule.py", RULE), ("game.py", GAME), ("template.jinja", TEMPLATE)):
            (folder / name).write_text(text)
    return folder


def play(task: Path) -> list[str]:
    """Settings of a job that plays episodes. Most are longer than a step's tokens, and go on in later steps."""
    return [
        "reward=environment", "reward.rule=''", "reward.max_missing=1", f"environment.target='{task / 'game.py'}:Game'",
        f"data.chat_template='{task / 'template.jinja'}'", "sampling.max_tokens=8", "rollout.max_model_len=128",
        "environment.processes=1", "algorithm=grpo_decoupled", "stream.step_tokens=11", "stream.lag=1",
    ]  # fmt: skip


def command(task: Path, run_dir: Path, overrides: list[str]) -> list[str]:
    """The job; `overrides` come last."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={KILLS}",
        "-m", "aligner.main", "--config-name=quickstart", f"model.path={task / 'model'}", f"data.path={task / 'prompts.jsonl'}",
        f"data.eval_path={task / 'heldout.jsonl'}", f"reward.rule='{task / 'rule.py'}:digits'", "reward.workers=1",
        f"run_dir={run_dir}", f"train.steps={STEPS}", "train.eval_every=3", "train.save=false", "train.report=false",
        "data.prompts_per_step=4", "algorithm.group_size=4", "sampling.max_tokens=20", "rollout.kv_cache_mib=16",
        "logging.console=false", "logging.samples_every=1", "checkpoint.every=2", *overrides,
    ]  # fmt: skip


def run(task: Path, run_dir: Path, overrides: list[str], plan: list[tuple[float, bool]], chance: random.Random) -> Run:
    """Run the job to its end; after each (seconds, wait for a save) of `plan` kill a rank, if the job is still running."""
    disturbed_run = Run(run_dir)
    start = time.monotonic()
    with run_dir.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(
            command(task, run_dir, overrides), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            for seconds, in_save in plan:
                _kill_one(process, disturbed_run, seconds, in_save, chance, start)
            disturbed_run.status = process.wait(timeout=max(1.0, LIMIT - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        disturbed_run.output = log.read()
    disturbed_run.seconds = time.monotonic() - start
    return disturbed_run


def _kill_one(
    process: subprocess.Popen[Any], disturbed_run: Run, after: float, in_save: bool, chance: random.Random, start: float
) -> None:
    end = time.monotonic() + after
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    while in_save and process.poll() is None and not _saving(disturbed_run.folder) and time.monotonic() - start < LIMIT:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.01) if in_save else 0)
    ranks = {}
    while process.poll() is None and not ranks:  # between two attempts there is nobody
        ranks = dict(_ranks_of(process.pid))
        time.sleep(0 if ranks else 0.01)
    if ranks:
        rank = chance.choice(sorted(ranks))
        saving = " in a save" if _saving(disturbed_run.folder) else ""
        try:
            os.kill(ranks[rank], signal.SIGKILL)
        except ProcessLookupError:
            return
        disturbed_run.kills.append(f"rank {rank} at {time.monotonic() - start:.1f} s{saving}")
        while Path(f"/proc/{ranks[rank]}").exists():  # not the same one twice
            time.sleep(0.01)


def _saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".step-*.partial"))


def _ranks_of(agent: int) -> Iterator[tuple[int, int]]:
    """(rank, process) of the living ranks that torchrun has started: its children that lead sessions of their own."""
    leaders = []
    for folder in Path("/proc").iterdir():
        try:
            state, parent, _, session, *others = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # no process, or it has just ended
            continue
        if state != "Z" and int(parent) == agent and session == folder.name:
            leaders.append((int(others[15]), int(folder.name)))  # in the order of their starts
    yield from enumerate(process for _, process in sorted(leaders))


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that must be equal: files of the last checkpoint with their checksums, its state, the metrics, the samples."""
    last = complete(run_dir / "checkpoints")[0]
    files = json.loads((last / "manifest.json").read_text())["files"]
    state = json.loads((last / "state.json").read_text())
    del state["config"]  # it names the folder
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]
    return {
        "step": last.name,
        "files": {n: f for n, f in files.items() if n != "state.json"},
        "state": state,
        "rows": kept,
        "samples": {step: records_path(run_dir, step).read_text() for step in range(1, STEPS + 1)},
    }


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The first difference; "" if there is none."""
    for name in expected:
        if expected[name] != found[name]:
            entry, other = json.dumps(expected[name]), json.dumps(found[name])
            at = next(
                (i for i, (a, b) in enumerate(zip(entry, other, strict=False)) if a != b), min(len(entry), len(other))
            )
            return f"{name}: ...{entry[max(0, at - 60) : at + 40]}... became ...{other[max(0, at - 60) : at + 40]}..."
    return ""


def main(arguments: list[str]) -> int:
    """Run the undisturbed job and the disturbed ones; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", action="store_true", help="play episodes, partly, in slow environments")
    parser.add_argument("--runs", type=int, default=50, help="runs that are disturbed")
    parser.add_argument("--kills", type=int, default=KILLS, help="at most so many in a run")
    parser.add_argument("--seed", type=int, default=0, help="decides when and whom")
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="further settings of the job")
    options = parser.parse_args(arguments)
    out = (options.out or Path(tempfile.mkdtemp(prefix="kill-"))).resolve()
    task = make_task(out / "task")
    overrides = [*(play(task) if options.episodes else []), *options.overrides]
    calm = run(task, out / "calm", overrides, [], random.Random())
    if calm.status:
        raise SystemExit(f"the run that nothing disturbs ends with status {calm.status}:\n{calm.output[-4000:]}")
    expected = outcome(calm.folder)
    print(f"undisturbed: {calm.seconds:.1f} s, {STEPS} steps; runs in {out}", flush=True)
    wrong, kills, saves, seconds = 0, 0, 0, []
    for number in range(options.runs):
        chance = random.Random(f"{options.seed}/{number}")
        plan = [
            (chance.uniform(0, calm.seconds), chance.random() < 0.5) for _ in range(chance.randint(1, options.kills))
        ]
        disturbed_run = run(task, out / f"run{number}", overrides, plan, chance)
        if disturbed_run.status:
            verdict = f"ENDED WITH STATUS {disturbed_run.status}: {disturbed_run.output[-1500:]}"
        elif disturbed_run.status is None:
            verdict = f"NO END WITHIN {LIMIT:.0f} s: {disturbed_run.output[-1500:]}"
        else:
            differs = difference(expected, outcome(disturbed_run.folder))
            verdict = f"DIFFERS: {differs}" if differs else "the same to the last bit"
        wrong += verdict != "the same to the last bit"
        kills += len(disturbed_run.kills)
        saves += sum("save" in kill for kill in disturbed_run.kills)
        seconds.append(disturbed_run.seconds)
        print(
            f"run {number:2}: {disturbed_run.seconds:5.1f} s  {'; '.join(disturbed_run.kills) or 'not hit'}: {verdict}",
            flush=True,
        )
    print(
        f"{options.runs - wrong} of {options.runs} runs are the same to the last bit, after {kills} kills, {saves} of them in a "
        f"save; median {median(seconds):.1f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
