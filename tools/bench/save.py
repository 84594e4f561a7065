"""Cost of checkpoints: their time compared with a raw write of the same bytes, and step time while one is being written.

`python tools/bench/save.py [--steps 24] [--out DIR]`. An SFT job on 2 ranks, a model of about 30M fp32 parameters (masters and
moments: 360 MB a checkpoint), three times: without checkpoints, with the loop waiting for each, and beside training. The raw
write is one file a rank of as many bytes, from memory, through to the disk, both ranks at once, right after each job.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.checkpoint.folder import complete
from aligner.data.column_addition import ColumnAddition, ModelShape, write_task

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = ModelShape(hidden=512, layers=8, heads=8, kv_heads=8, head_dim=64, ffn=1792)
EVERY = 6
CASES = {
    "no checkpoint": ["checkpoint.every=0"],
    "waiting": [f"checkpoint.every={EVERY}", "checkpoint.beside=false"],
    "beside": [f"checkpoint.every={EVERY}", "checkpoint.beside=true"],
}


def job(task: Path, run_dir: Path, steps: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Run a job; returns its rows of metrics."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "aligner.main",
        "--config-name=quickstart_sft", f"model.path={task / 'model'}", f"data.path={task / 'demonstrations.jsonl'}",
        "data.eval_path=null", f"run_dir={run_dir}", f"train.steps={steps}", "train.eval_every=0", "train.save=false",
        "train.report=false", "logging.console=false", "checkpoint.keep=9", *overrides,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{run_dir.name}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def raw_write(folder: Path, sizes: list[int]) -> float:
    """Seconds to write files of these sizes concurrently, with fsync."""
    contents = [os.urandom(1 << 20) * (size >> 20) for size in sizes]

    def one(number: int) -> None:
        with (folder / f"raw{number}").open("wb", buffering=0) as file:
            rest = memoryview(contents[number])
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(sizes))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for number in range(len(sizes)):
        (folder / f"raw{number}").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4 * EVERY)
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    out = (args.out or Path(tempfile.mkdtemp(prefix="save-"))).resolve()
    task = out / "task"
    if not task.exists():
        write_task(task, ColumnAddition(demonstrations=2048, prompts=8, heldout=8, preferences=8), SHAPE)
    plain = None
    for name, overrides in CASES.items():
        run_dir = out / name.replace(" ", "_")
        rows = job(task, run_dir, args.steps, overrides)[1:]
        saves = [json.loads((path / "manifest.json").read_text()) for path in complete(run_dir / "checkpoints")]
        beside = [row for row in rows if (row["step"] - 1) % EVERY == 0]  # a checkpoint has just been begun
        seconds = median(row["seconds"] for row in rows)
        plain = plain or seconds
        print(f"{name}: step {seconds:.2f} s, {seconds / plain:.2f} x", flush=True)
        if not saves:
            continue
        sizes = [size for file, (size, _) in saves[0]["files"].items() if file.endswith(".safetensors")]
        raw = median(raw_write(out, sizes) for _ in range(5))
        wrote = median(save["seconds"] for save in saves)
        held_up = median(row["seconds_checkpoint"] for row in rows if "seconds_checkpoint" in row)
        during = median(row["seconds"] for row in beside)
        print(
            f"  checkpoint of {sum(sizes) / 1e6:.0f} MB: {wrote:.2f} s, raw write {raw:.2f} s: {wrote / raw:.2f} x; the loop "
            f"is held up {held_up:.2f} s; the step after its start {during:.2f} s, {during / plain:.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
