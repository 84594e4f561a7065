"""Step time of GRPO on 4 ranks, two that train and two that generate, for several streams.

`python tools/bench/overlap.py [--out DIR]`. The model is tiny and real; both engines run, and **sleep** beside their work
as long as a larger model would compute (tools/bench/overlap_loop.py): on a machine of few cores the two sides could not
compute at the same time, but waiting they can. So this measures the schedule, not the speed of a model. Each stream is a
whole job; its timelines stay in DIR: `python tools/report.py DIR/NAME --timeline` draws a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.data.column_addition import ColumnAddition, ModelShape, write_task

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, FIRST = 12, 4
TOKENS, TOKEN_SECONDS, UPDATE_SECONDS = 24, 0.08, 2.0
STREAMS = {
    "lag 0": ["stream.lag=0"],
    "lag 1": ["stream.lag=1"],
    "lag 1, in flight": ["stream.lag=1", "stream.in_flight=true"],
    "lag 2": ["stream.lag=2"],
}


def job(name: str, overrides: list[str], task: Path, out: Path) -> list[dict[str, float]]:
    """The rows of the steps after the first ones."""
    run_dir = out / name.replace(", ", "-").replace(" ", "")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "aligner.main",
        "--config-name=quickstart", "algorithm=grpo_decoupled", "algorithm.roles=[policy,rollout,reward]",
        "algorithm._target_=tools.bench.overlap_loop.slow_grpo", f"+algorithm.token_seconds={TOKEN_SECONDS}",
        f"+algorithm.update_seconds={UPDATE_SECONDS}", "algorithm.group_size=4", f"model.path={task / 'model'}",
        f"data.path={task / 'prompts.jsonl'}", "data.prompts_per_step=8", "train.eval_every=0", "train.save=false",
        f"train.steps={STEPS}", f"sampling.max_tokens={TOKENS}", "sampling.stop_token_ids=[]", "rollout.kv_cache_mib=16",
        "placement.policy.ranks=[0,1]", "placement.rollout.ranks=[2,3]", "placement.reward.ranks=[2,3]",
        "reward.workers=1", f"run_dir={run_dir}", "overwrite=true", *overrides,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] >= FIRST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs (default: a temporary one)")
    out = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="overlap-"))
    task = out / "task"
    if not task.exists():
        shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
        write_task(task, ColumnAddition(demonstrations=8, prompts=256, heldout=8, preferences=8), shape)
    print(f"generation sleeps {TOKENS * TOKEN_SECONDS:.2f} s a step, the update {UPDATE_SECONDS:.2f} s; runs in {out}")
    print(f"{'stream':18} {'step s':>7} {'ratio':>6} {'generate':>9} {'update':>7} {'reshard':>8} {'staleness':>10}")
    first = None
    for name, overrides in STREAMS.items():
        rows = job(name, overrides, task, out)
        seconds = median(row["seconds"] for row in rows)
        first = first or seconds
        shown = [median(row[f"seconds_{key}"] for row in rows) for key in ("generate", "update", "reshard")]
        staleness = median(row["staleness"] for row in rows)
        print(
            f"{name:18} {seconds:7.2f} {seconds / first:6.2f} {shown[0]:9.2f} {shown[1]:7.2f} {shown[2]:8.2f} "
            f"{staleness:10.2f}"
        )


if __name__ == "__main__":
    main()
