"""A step of SFT, DPO and a reward model beside TRL's and beside plain transformers and torch: equal work, in turn.

python tools/bench/train.py --quick                                     SFT of 0.66M parameters, one round: a minute
python tools/bench/train.py --cases sft/9.8M/fixed dpo/9.8M/natural --json runs/train.json --write docs/performance.md

Model, rows, their order, precision and the number of threads are the same on every side.

  aligner       torchrun -m aligner.main, 2 ranks x 1 thread, on Megatron-core
  aligner-1     the same on 1 rank x 1 thread
  fsdp, fsdp-1  the same with engine=fsdp
  trl           SFTTrainer, DPOTrainer, RewardTrainer, 1 process x 2 threads, no packing
  trl-2         the same on 2 processes x 1 thread
  bare          train_bare.py, 2 processes x 1 thread: transformers, torch's fused AdamW, gradients summed by gloo
  bare-1        the same, 1 process x 2 threads

A case is METHOD/SIZE/LENGTHS or METHOD/SIZE/LENGTHS/PRECISION. A step has 32 demonstrations or 16 pairs. fixed: rows of
128 tokens, a quarter of them the prompt; natural: log-normal lengths with a median of 128 tokens, 512 at most. fp32, or
bf16: float32 master weights on every side, TRL and bare under autocast.

Threads of one process wait for each other at every operation, so `trl` and `bare-1` need a machine without other work; the
sides of two processes suffer no more from it than ours. Seconds are medians over the steps of all rounds, without the first two of a run; "aligner is" compares tokens a second,
prompts included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import alternation  # noqa: E402
import workloads  # noqa: E402

WARMUP = 2
LR = 1e-9
LIMIT = 900.0
"""Seconds of one run, at most."""
SIDES = ("aligner", "aligner-1", "fsdp", "fsdp-1", "trl", "trl-2", "bare", "bare-1")
BATCH = {"sft": 32, "dpo": 16, "reward_model": 16}
"""Demonstrations or pairs of a step, by method."""
LENGTHS = {"fixed": 128, "natural": 512}
"""Tokens of the longest row."""
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    method: str
    size: str
    lengths: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """As it is given."""
        return f"{self.method}/{self.size}/{self.lengths}/{self.precision}"


def case_of(text: str) -> Case:
    """METHOD/SIZE/LENGTHS[/PRECISION]."""
    parts = text.split("/")
    works = (BATCH, workloads.SIZES, LENGTHS, PRECISIONS)
    if not 3 <= len(parts) <= 4 or any(part not in names for part, names in zip(parts, works, strict=False)):
        raise argparse.ArgumentTypeError(
            f"{text} is no case; write METHOD/SIZE/LENGTHS or METHOD/SIZE/LENGTHS/PRECISION of "
            + "; ".join(", ".join(names) for names in works)
        )
    return Case(*parts)


class Bench:
    """One case in a folder: its model, its rows, and the sides that run on them."""

    def __init__(self, case: Case, steps: int, work: Path, extra: Sequence[str]) -> None:
        self.case, self.steps, self.work, self.extra = case, steps, work, extra
        self.peers = alternation.PeerRuns(work, "train", LIMIT)
        self.batch, self.max_tokens = BATCH[case.method], LENGTHS[case.lengths]
        workloads.write_model(work / "model", workloads.SIZES[case.size])
        self.rows = workloads.answered_rows(
            self.batch * (steps + WARMUP), self.max_tokens, case.lengths == "natural", case.method != "sft"
        )
        workloads.write_rows(work / "rows.jsonl", self.rows)

    def sides(self, names: Sequence[str]) -> dict[str, Callable[[], alternation.Run]]:
        """What runs each side once."""
        peer: dict[str, Callable[[], alternation.Run]] = {
            "aligner": self.aligner,
            "aligner-1": partial(self.aligner, ranks=1),
            "fsdp": partial(self.aligner, "fsdp"),
            "fsdp-1": partial(self.aligner, "fsdp", 1),
            "trl": partial(self.trl, 1, 2),
            "trl-2": partial(self.trl, 2, 1),
            "bare": partial(self.bare, 2, 1),
            "bare-1": partial(self.bare, 1, 2),
        }
        return {name: peer[name] for name in names}

    def aligner(self, engine: str = "megatron", ranks: int = 2) -> alternation.Run:
        """A real job, from row to row of its metrics."""
        run_dir, method = self.peers.folder(f"aligner-{engine}-{ranks}"), self.case.method
        model = "reward_model" if method == "reward_model" else "policy"
        command = alternation.torchrun(ranks, [
            "-m", "aligner.main", f"algorithm={method}", f"data={'demonstrations' if method == 'sft' else 'preferences'}",
            f"model.path={self.work / 'model'}", f"data.path={self.work / 'rows.jsonl'}", "data.shuffle=false",
            f"data.prompts_per_step={self.batch}", f"data.max_tokens={self.max_tokens}",
            f"{model}.dtype={PRECISIONS[self.case.precision]}", f"{model}.optimizer.lr={LR}", f"run_dir={run_dir}",
            f"policy.engine={engine}", f"{model}.engine={engine}",
            f"train.steps={self.steps + WARMUP}", "train.eval_every=0", "train.save=false", "train.report=false",
            "logging.console=false", *self.extra,
        ])  # fmt: skip
        alternation.run_all([command], 1, LIMIT, run_dir.with_suffix(".log"))
        steps = [{"step": seconds} for _, seconds in alternation.rows_of_steps(run_dir, WARMUP)]
        return self._counted({"steps": steps})

    def trl(self, processes: int, threads: int) -> alternation.Run:
        """TRL's trainer."""
        return self._counted(self.peers.trl(self._spec(), processes, threads))

    def bare(self, processes: int, threads: int) -> alternation.Run:
        """Transformers and torch alone."""
        return self._counted(self.peers.bare(self._spec(), processes, threads))

    def _spec(self) -> dict[str, Any]:
        return {
            "method": self.case.method, "model": str(self.work / "model"), "rows": str(self.work / "rows.jsonl"),
            "batch": self.batch, "max_tokens": self.max_tokens, "steps": self.steps, "warmup": WARMUP, "lr": LR,
            "dtype": PRECISIONS[self.case.precision],
        }  # fmt: skip

    def _counted(self, run: alternation.Run) -> alternation.Run:
        """With each step's tokens: all sides take the rows in their order."""
        for number, step in enumerate(run["steps"], start=WARMUP):
            rows = self.rows[number * self.batch : (number + 1) * self.batch]
            step["tokens"] = sum(workloads.tokens_of(row) for row in rows)
        return run


def main(arguments: Sequence[str]) -> int:
    """Measure, and print or write the table."""
    return alternation.benchmark(
        arguments,
        name="tools/bench/train.py",
        description=__doc__,
        case_of=case_of,
        cases=[Case(method, "9.8M", "fixed") for method in BATCH],
        quick=Case("sft", "0.66M", "fixed"),
        sides=SIDES,
        bench=Bench,
        report=lambda results: alternation.table(results, (), "tokens"),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
