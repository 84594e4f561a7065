"""A GRPO step of the product beside TRL's and beside bare vLLM with a bare training step: equal work, in turn.

python tools/bench/grpo.py --quick                                     0.66M parameters, one round: two minutes
python tools/bench/grpo.py --cases 0.66M/fixed 9.8M/long --rounds 3 --json runs/grpo.json --write docs/performance.md
python tools/bench/grpo.py --cases --json runs/grpo.json --write docs/performance.md     write what was measured before

The machine's two cores are used alike by every side: model, prompts, lengths, precision and the number of threads are the
same, the learning rate is so small that the weights, and with them the lengths, stay.

  aligner       torchrun -m aligner.main, 2 ranks x 1 thread
  trl           GRPOTrainer, generation by transformers, 1 process x 2 threads
  trl-2         the same on 2 processes x 1 thread
  trl-vllm      GRPOTrainer with use_vllm, colocated, 1 process x 2 threads; vLLM's packing of weights is turned off,
                since TRL's weight sync fails on packed ones
  bare          grpo_bare.py, 2 processes x 1 thread: LLM.generate, a step of transformers and torch, a copy of the weights
  bare-1        the same, 1 process x 2 threads
  bare-compiled like bare, with vLLM's torch.compile

A case is SIZE/LENGTHS or SIZE/LENGTHS/PRECISION. fixed, natural: prompts of 13 tokens, 64 tokens exactly, or ended by the
model after 26 on average; long: prompts of 96 to 224 tokens, ended by the model, 256 at most. fp32, or bf16: ours with
bfloat16 models and engine, TRL's and the bare one's under autocast; mixed: ours with a bfloat16 engine alone.

Threads of one process wait for each other at every operation, so `trl` and `bare-1` need a machine without other work; the
sides of two processes suffer no more from it than ours. Seconds are medians over the steps of all rounds, without the first two of a run; "aligner is" compares tokens a second.
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
"""Steps of each run that are not counted."""
LR = 1e-9
PROMPTS, GROUP = 8, 8
LIMIT = 900.0
"""Seconds of one run, at most."""
SIDES = ("aligner", "trl", "trl-2", "trl-vllm", "bare", "bare-1", "bare-compiled")
PHASES = ("generate", "update", "sync", "other")


@dataclass(frozen=True)
class Lengths:
    """Of prompts and responses, in tokens."""

    shortest: int
    longest: int
    max_tokens: int
    mean: float | None = None
    """Of a response that nothing cuts; None: all have max_tokens."""

    @property
    def whole(self) -> int:
        """max_model_len, in whole blocks of the KV cache."""
        return -(-(self.longest + self.max_tokens) // 32) * 32


LENGTHS = {
    "fixed": Lengths(13, 13, 64),
    "natural": Lengths(13, 13, 64, mean=30.0),
    "long": Lengths(96, 224, 256, mean=128.0),
}
PRECISIONS = ("fp32", "bf16", "mixed")


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    size: str
    lengths: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """As it is given."""
        return f"{self.size}/{self.lengths}/{self.precision}"

    @property
    def dtypes(self) -> tuple[str, str]:
        """Of the policy and the engine."""
        return {
            "fp32": ("float32", "float32"),
            "bf16": ("bfloat16", "bfloat16"),
            "mixed": ("float32", "bfloat16"),
        }[self.precision]


def case_of(text: str) -> Case:
    """SIZE/LENGTHS[/PRECISION]."""
    parts = text.split("/")
    works = (workloads.SIZES, LENGTHS, PRECISIONS)
    if not 2 <= len(parts) <= 3 or any(part not in names for part, names in zip(parts, works, strict=False)):
        raise argparse.ArgumentTypeError(
            f"{text} is no case; write SIZE/LENGTHS or SIZE/LENGTHS/PRECISION of {', '.join(workloads.SIZES)}; "
            f"{', '.join(LENGTHS)}; {', '.join(PRECISIONS)}"
        )
    return Case(*parts)


class Bench:
    """One case in a folder: its model, its prompts, and the sides that run on them."""

    def __init__(self, case: Case, steps: int, work: Path, extra: Sequence[str], ranks: int = 2) -> None:
        self.case, self.steps, self.work, self.extra, self.ranks = case, steps, work, extra, ranks
        self.lengths, self.peers = LENGTHS[case.lengths], alternation.PeerRuns(work, "grpo", LIMIT)
        workloads.write_model(work / "model", workloads.SIZES[case.size], self.lengths.mean)
        rows = workloads.prompt_rows(PROMPTS * (steps + WARMUP + 1), self.lengths.shortest, self.lengths.longest)
        workloads.write_rows(work / "prompts.jsonl", rows)

    def sides(self, names: Sequence[str]) -> dict[str, Callable[[], alternation.Run]]:
        """What runs each side once."""
        peer: dict[str, Callable[[], alternation.Run]] = {
            "aligner": self.aligner,
            "trl": partial(self.trl, 1, 2, "transformers"),
            "trl-2": partial(self.trl, 2, 1, "transformers"),
            "trl-vllm": partial(self.trl, 1, 2, "vllm"),
            "bare": partial(self.bare, 2, 1, True),
            "bare-1": partial(self.bare, 1, 2, True),
            "bare-compiled": partial(self.bare, 2, 1, False),
        }
        return {name: peer[name] for name in names}

    def aligner(self) -> alternation.Run:
        """A real job; its phases are the metrics that it logs, the slower rank's."""
        run_dir = self.peers.folder("aligner")
        lengths, (dtype, rollout_dtype) = self.lengths, self.case.dtypes
        command = alternation.torchrun(self.ranks, [
            "-m", "aligner.main", "algorithm=grpo", "algorithm.roles=[policy,rollout,reward]", f"algorithm.group_size={GROUP}",
            f"model.path={self.work / 'model'}", f"data.path={self.work / 'prompts.jsonl'}", "data.shuffle=false",
            f"data.prompts_per_step={PROMPTS}", f"data.max_prompt_tokens={lengths.longest}",
            f"sampling.max_tokens={lengths.max_tokens}", *([] if lengths.mean else ["sampling.stop_token_ids=[]"]),
            f"rollout.max_model_len={lengths.whole}", f"rollout.max_num_seqs={PROMPTS * GROUP}",
            f"rollout.dtype={rollout_dtype}", f"policy.dtype={dtype}", f"policy.optimizer.lr={LR}",
            f"reward.rule={Path(workloads.__file__)}:response_score", f"run_dir={run_dir}",
            f"train.steps={self.steps + WARMUP}", "train.eval_every=0", "train.save=false", "train.report=false",
            "logging.console=false", "logging.samples_every=0", *self.extra,
        ])  # fmt: skip
        alternation.run_all([command], 1, LIMIT, run_dir.with_suffix(".log"))
        return {"steps": [step_of(row, seconds) for row, seconds in alternation.rows_of_steps(run_dir, WARMUP)]}

    def trl(self, processes: int, threads: int, mode: str) -> alternation.Run:
        """TRL's trainer. Its master weights are float32, as ours are."""
        spec = {**self._spec(), "mode": mode, "autocast": self.case.dtypes[0] == "bfloat16", "dtype": "float32"}
        return self.peers.trl(spec, processes, threads)

    def bare(self, processes: int, threads: int, eager: bool) -> alternation.Run:
        """vLLM and a training step, without a framework."""
        return self.peers.bare({**self._spec(), "eager": eager}, processes, threads)

    def _spec(self) -> dict[str, Any]:
        dtype, rollout_dtype = self.case.dtypes
        return {
            "model": str(self.work / "model"), "rows": str(self.work / "prompts.jsonl"), "prompts": PROMPTS, "group": GROUP,
            "max_tokens": self.lengths.max_tokens, "max_model_len": self.lengths.whole, "fixed": self.lengths.mean is None,
            "steps": self.steps, "warmup": WARMUP, "lr": LR, "dtype": dtype, "rollout_dtype": rollout_dtype,
            "kv_cache_mib": 512,
        }  # fmt: skip


def step_of(row: dict[str, float], whole: float) -> dict[str, float]:
    """A row of our metrics as the phases of a step of `whole` seconds."""
    named = {name: row[f"seconds_{phase}"] for name, phase in (("generate", "generate"), ("update", "update"))}
    named["sync"] = row["seconds_reshard"]
    other = whole - sum(named.values())
    rows = PROMPTS * GROUP
    return {**named, "other": other, "step": whole, "tokens": row["length"] * rows, "length": row["length"]}


def report(results: alternation.Results) -> str:
    """The table, with the mean length of our responses in each case's name."""
    named = {
        f"{case}, mean length {length(sides):.0f}" if sides else case: sides for case, sides in results.items() if sides
    }
    return alternation.table(named, PHASES, "tokens")


def length(sides: dict[str, list[alternation.Run]]) -> float:
    """Mean tokens of a response, of the first side."""
    steps = [step for run in next(iter(sides.values())) for step in run["steps"]]
    return sum(step["length"] for step in steps) / len(steps)


def main(arguments: Sequence[str]) -> int:
    """Measure, and print or write the table."""
    return alternation.benchmark(
        arguments,
        name="tools/bench/grpo.py",
        description=__doc__,
        case_of=case_of,
        cases=[Case("0.66M", "fixed"), Case("9.8M", "fixed")],
        quick=Case("0.66M", "fixed"),
        sides=SIDES,
        bench=Bench,
        report=report,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
