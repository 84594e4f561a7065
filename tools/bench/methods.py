"""Learning curves of every method on the small task, over several seeds.

python tools/bench/methods.py --run DIR [--methods grpo ppo ...] [--seeds 0 1 2] [--out docs/methods.png]

DIR is a folder of launch/rlhf.sh with its stages sft and preferences done: every method starts from that SFT model.
Online methods earn the verifier's reward on the same prompts, 256 samples a step; offline ones learn from the same
preferences. Held-out accuracy is the verifier's on 256 prompts, one answer each at temperature 1; the reward model's is
over held-out pairs. A run whose metrics are there and complete is not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.report.metrics import read_metrics
from aligner.report.statistics import series

ROOT = Path(__file__).resolve().parent.parent.parent
ONLINE = ("stage=grpo", "train.steps=40", "logging.every=10")
ALL_SAMPLES = ("algorithm.group_size=8",)
PAIRS = ("stage=dpo",)
METHODS: dict[str, tuple[str, ...]] = {
    "grpo": ONLINE,
    "dr_grpo": ONLINE,
    "dapo": ONLINE,
    "gspo": ONLINE,
    "rloo": (*ONLINE, *ALL_SAMPLES, "policy.reduction=token_mean"),
    "reinforce_pp": (*ONLINE, *ALL_SAMPLES),
    "reinforce_pp_baseline": ONLINE,
    "remax": (*ONLINE, *ALL_SAMPLES, "policy.reduction=token_mean"),
    "ppo": (*ONLINE, *ALL_SAMPLES, "critic.optimizer.lr=1e-3"),
    "online_dpo": (*ONLINE, "data.prompts_per_step=128"),
    "reward_model": ("stage=reward_model",),
    "dpo": PAIRS,
    "robust_dpo": PAIRS,
    "ipo": (*PAIRS, "algorithm.loss.beta=2"),
    "simpo": (*PAIRS, "policy.optimizer.lr=1e-4", "algorithm.loss.beta=2", "algorithm.loss.nll_coef=1"),
    "orpo": (*PAIRS, "policy.optimizer.lr=1e-4", "algorithm.loss.beta=0.1"),
    "kto": (
        *PAIRS,
        "policy.optimizer.lr=1e-4",
        "algorithm.loss.beta=0.1",
        "data.kind=feedback",
        "data.prompts_per_step=64",
    ),
}
OFF_POLICY = (*ONLINE, "algorithm=grpo_decoupled")
STREAMS: dict[str, tuple[str, ...]] = {
    "lag_2": (*OFF_POLICY, "stream.lag=2"),
    "lag_2_masked": (*OFF_POLICY, "stream.lag=2", "algorithm.loss.correction=mask"),
    "lag_2_uncorrected": (*OFF_POLICY, "stream.lag=2", "algorithm.loss.correction=none"),
    "lag_2_clipped": (*ONLINE, "algorithm=grpo", "stream.lag=2"),
    "lag_8": (*OFF_POLICY, "stream.lag=8"),
    "lag_8_uncorrected": (*OFF_POLICY, "stream.lag=8", "algorithm.loss.correction=none"),
    "partial": (*OFF_POLICY, "stream.step_tokens=16"),
}
"""GRPO off-policy, to be compared with grpo."""
WITHOUT_REFERENCE = ("orpo", "simpo")


def overrides(method: str, run: Path, seed: int) -> list[str]:
    """The overrides of one method and seed."""
    settings = [
        *(METHODS | STREAMS)[method],
        f"seed={seed}",
        f"run_dir={folder_of(run, method, seed)}",
        "overwrite=true",
    ]
    stage = next(value.removeprefix("stage=") for value in settings if value.startswith("stage="))
    if method in METHODS and method != stage:
        settings.append(f"algorithm={method}")
    if stage == "dpo":
        roles = "policy,rollout,reward" if method in WITHOUT_REFERENCE else "policy,reference,rollout,reward"
        settings.append(f"algorithm.roles=[{roles}]")
    return [*settings, "train.save=false", "train.report=false"]


def folder_of(run: Path, method: str, seed: int) -> Path:
    return run / "methods" / f"{method}-seed{seed}"


def accuracy(run: Path, method: str, seed: int) -> tuple[list[int], list[float]]:
    """(steps, held-out accuracies); empty if there is no run."""
    try:
        return series(read_metrics(folder_of(run, method, seed)), "accuracy", keep_gaps=False)
    except ValueError:
        return [], []


def complete(run: Path, method: str, seed: int) -> bool:
    return (folder_of(run, method, seed) / "done").exists()


def train(run: Path, method: str, seed: int, ranks: int, limit: int) -> None:
    """Run one job; its output goes to a log beside its metrics. Raises RuntimeError if it fails."""
    folder = folder_of(run, method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "RLHF_RUN": str(run), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "aligner.main", "--config-name=rlhf", *overrides(method, run, seed)]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed} failed; see {folder / 'log.txt'}")
    (folder / "done").touch()


def table(run: Path, methods: list[str], seeds: list[int]) -> str:
    """Markdown: accuracy before and after, for each seed."""
    lines = ["| method | before | " + " | ".join(f"after, seed {seed}" for seed in seeds) + " | mean |"]
    lines.append("| --- " * (len(seeds) + 3) + "|")
    for method in methods:
        curves = [accuracy(run, method, seed)[1] for seed in seeds]
        reached = [f"{curve[-1]:.3f}" if curve else "-" for curve in curves]
        there = [curve for curve in curves if curve]
        if there:
            means = [f"{mean(curve[0] for curve in there):.3f}", f"{mean(curve[-1] for curve in there):.3f}"]
            lines.append(f"| {method} | {means[0]} | " + " | ".join(reached) + f" | {means[1]} |")
    return "\n".join(lines)


def draw(run: Path, methods: list[str], seeds: list[int], out: Path) -> None:
    """Draw a small plot per method, with one colour per seed."""
    from matplotlib.figure import Figure

    shown = [method for method in methods if any(accuracy(run, method, seed)[0] for seed in seeds)]
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(13, 2.6 * rows), layout="constrained")
    for number, method in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, 4, number)
        for seed in seeds:
            axes.plot(*accuracy(run, method, seed), marker="o", markersize=3, label=f"seed {seed}")
        axes.set(title=method, ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.supxlabel("step")
    figure.supylabel("held-out accuracy")
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of launch/rlhf.sh")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS | STREAMS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=int, default=900, help="seconds of one job, at most")
    parser.add_argument("--out", type=Path, help="PNG; default: DIR/methods.png")
    arguments = parser.parse_args()
    run = arguments.run.resolve()
    if not (run / "sft" / "model").is_dir():
        parser.error(f'--run {run} has no sft/model; bash launch/rlhf.sh --out {run} --stages "sft preferences"')
    failed = []
    for seed in arguments.seeds:
        for method in arguments.methods:
            if not complete(run, method, seed):
                try:
                    train(run, method, seed, arguments.ranks, arguments.limit)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failed.append(str(error))
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    continue
            curve = accuracy(run, method, seed)[1]
            print(f"{method}, seed {seed}: {' '.join(f'{value:.3f}' for value in curve)}", flush=True)
    print(table(run, arguments.methods, arguments.seeds))
    draw(run, arguments.methods, arguments.seeds, arguments.out or run / "methods.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
