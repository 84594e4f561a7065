"""Two revisions train alike: every metric of the same jobs, compared to the last bit.

`python tools/bench/same.py REV1 REV2 [--jobs grpo,ppo,...] [--ranks 1,2,4] [--steps N] [--out DIR]`. Each revision is checked
out into a folder of its own and runs the quickstart's SFT and GRPO (seed 0), PPO, DPO and GRPO with stream.lag=1, each on 1
rank, with tensor=2 on 2 ranks and with tensor=2, pipeline=2 on 4 ranks, from one model and one data set that REV1 makes.
Compared are all rows of metrics.jsonl and all fields but those of time and memory. Exit status 1 if anything differs.

What a step costs may change between revisions, what it computes may not: the check for a change that should change nothing.
`--steps` sets the steps of each job (default: a few, with an evaluation in the middle); `--steps full` those of the quickstart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900.0
"""Limit of one job."""
TIMES = ("time", "seconds", "tokens_per_second", "memory", "reshard_", "reshard/")
"""How the names of fields begin that are times, rates or bytes."""
RENAMED: dict[str, str] = {}
"""Fields that have a better name now: old -> new."""

LAYOUTS: dict[int, list[str]] = {
    1: [],
    2: ["placement.policy.tensor=2"],
    4: ["placement.policy.tensor=2", "placement.policy.pipeline=2", "placement.policy.stage_layers=[1,2]"],
}
"""Ranks -> where the policy and the models beside it are cut; rollout: a replica on each rank."""
ONLINE = ["--config-name=quickstart", "data.path={task}/prompts.jsonl", "data.eval_path={task}/heldout.jsonl", "data.eval_prompts=32"]  # fmt: skip
SHORT = ["train.steps=6", "train.eval_every=3", "data.prompts_per_step=8"]
JOBS: dict[str, list[str]] = {
    "sft": ["--config-name=quickstart_sft", "data.path={task}/demonstrations.jsonl", "train.steps=40", "logging.every=1"],
    "grpo": [*ONLINE, *SHORT],
    "ppo": [*ONLINE, *SHORT, "algorithm=ppo", "algorithm.kl_control.initial=0.05", "policy.minibatches=2", "critic.minibatches=2"],
    "dpo": [
        "--config-name=quickstart", "algorithm=dpo", "data=preferences", "data.path={task}/preferences.jsonl",
        "data.eval_path={task}/heldout_preferences.jsonl", *SHORT, "data.max_tokens=64",
    ],
    "lag1": [*ONLINE, *SHORT, "algorithm=grpo_decoupled", "stream.lag=1"],
}  # fmt: skip
"""Job -> its settings; the quickstart's SFT and GRPO, PPO with its critic and reference, DPO, GRPO a batch behind."""
FULL = {"sft": ["train.steps=900"], "grpo": ["train.steps=60", "train.eval_every=10", "data.prompts_per_step=32"]}
"""The quickstart as it stands."""


class Revision:
    """One revision in a folder of its own, and the jobs that it has run."""

    def __init__(self, name: str, out: Path) -> None:
        commit = _git("rev-parse", "--verify", f"{name}^{{commit}}")
        self.name, self.tree, self.out = name, out / f"tree_{commit[:12]}", out / f"runs_{commit[:12]}"
        if not self.tree.exists():
            self.tree.mkdir(parents=True)
            archive = subprocess.run(["git", "-C", ROOT, "archive", commit], stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "-x", "-C", self.tree], input=archive.stdout, check=True)

    def python(self, *arguments: str, seconds: float = SECONDS) -> None:
        """`python ARGUMENTS` in this tree; its output is shown where it fails."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True, timeout=seconds, check=False)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(arguments)} left with {done.returncode}\n{done.stderr[-4000:]}")

    def job(self, task: Path, name: str, ranks: int, settings: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl of a job; it is run once only."""
        run_dir = self.out / f"{name}_{ranks}"
        if not (run_dir / "finished").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "aligner.main"]
            common = [f"run_dir={run_dir}", "seed=0", "train.report=false", "logging.console=false"]
            model = [] if any(s.startswith("model.path=") for s in settings) else [f"model.path={task / 'sft'}"]
            self.python(*launch, *(s.format(task=task) for s in settings), *LAYOUTS[ranks], *model, *common)
            (run_dir / "finished").touch()
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def make_task(revision: Revision, out: Path) -> Path:
    """Data of seed 0, and a model that 300 steps of SFT have taught something: rewards and advantages differ."""
    task = out / "task"
    if not (task / "sft" / "config.json").exists():
        revision.python("-m", "aligner.data.column_addition", "--out", str(task), "--seed", "0")
        for name in ("preferences", "heldout_preferences"):
            if not (task / f"{name}.jsonl").exists():
                _pairs(task / "demonstrations.jsonl", task / f"{name}.jsonl")
        settings = [*JOBS["sft"], f"model.path={task / 'model'}", "train.steps=300"]
        revision.job(task, "begin", 1, settings)
        shutil.copytree(revision.out / "begin_1" / "model", task / "sft")
    return task


def _pairs(demonstrations: Path, out: Path) -> None:
    """Preferences from demonstrations: the right answer before the next row's."""
    rows = [json.loads(line) for line in demonstrations.read_text().splitlines()[:96]]
    pairs = itertools.pairwise(rows)
    lines = [
        json.dumps({"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}) for a, b in pairs
    ]
    out.write_text("".join(f"{line}\n" for line in lines))


def differences(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each field that is not the same, with its step and both values."""
    if len(before) != len(after):
        return [f"{len(before)} rows, {len(after)} rows"]
    different = []
    for old, new in zip(before, after, strict=True):
        old = {RENAMED.get(name, name): value for name, value in old.items() if not name.startswith(TIMES)}
        new = {name: value for name, value in new.items() if not name.startswith(TIMES)}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name, "absent") != new.get(name, "absent"):
                different.append(
                    f"step {old.get('step')}: {name}: {old.get(name, 'absent')}, {new.get(name, 'absent')}"
                )
    return different


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def main() -> int:
    """Run, compare, print a line for each job."""
    parser = argparse.ArgumentParser(description="Do two revisions compute the same metrics, to the last bit?")
    parser.add_argument("revisions", nargs=2, metavar="REV", help="commits, branches or tags")
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"default: {','.join(JOBS)}")
    parser.add_argument("--ranks", default="1,2,4", help="default: 1,2,4")
    parser.add_argument("--steps", help="steps of each job, or full: the quickstart as it stands")
    parser.add_argument("--out", type=Path, help="a folder that keeps trees and runs; by default a temporary one")
    arguments = parser.parse_args()
    jobs, ranks = arguments.jobs.split(","), [int(number) for number in arguments.ranks.split(",")]
    for chosen, known in ((jobs, JOBS), (ranks, LAYOUTS)):
        if unknown := [str(choice) for choice in chosen if choice not in known]:
            parser.error(f"{', '.join(unknown)} is not one of {', '.join(map(str, known))}")
    with tempfile.TemporaryDirectory() as temporary:
        out = (arguments.out or Path(temporary)).resolve()
        before, after = (Revision(name, out) for name in arguments.revisions)
        task = make_task(before, out)
        failed = 0
        for name in jobs:
            for size in ranks:
                settings_of_length = FULL.get(name, []) if arguments.steps == "full" else [f"train.steps={arguments.steps}"] if arguments.steps else []  # fmt: skip
                settings = [*JOBS[name], *settings_of_length]
                rows = [revision.job(task, name, size, settings) for revision in (before, after)]
                different = differences(*rows)
                failed += bool(different)
                fields = sum(not name.startswith(TIMES) for row in rows[0] for name in row)
                print(f"{name:5s} {size} ranks: {len(rows[0])} rows, {fields} values: " + (f"{len(different)} DIFFER" if different else "identical"), flush=True)  # fmt: skip
                print("".join(f"    {line}\n" for line in different[:10]), end="", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
