"""Loss curves of SFT and DPO compared with TRL's: same initial weights, rows, order and AdamW, in float32.

python tools/bench/trl_curves.py [--steps 50] [--method sft dpo] [--ranks 2] [--layouts one dp2 ...] [--again 4]

The task is column addition; SFT starts from random weights, DPO from what TRL's SFT has made of them. Ours are real jobs
(torchrun -m aligner.main) under every layout that needs at most --ranks ranks; TRL's are its SFTTrainer and DPOTrainer,
one process on the CPU (trl_curves_peer.py). Before curves are compared, so are token ids, trained tokens and learning
rates of every step. With --again 4 TRL runs once more with each step in 4 microbatches, which changes nothing but the
order of sums: how far rounding alone takes a curve.

`transformers` begins a warm-up with a step at rate 0, ours with lr / warmup_steps; TRL gets ours. Everything else is
what the same settings mean to both. The exit status is 1 where a curve leaves the bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MAX_LOSS, MEAN_LOSS = 1e-3, 1e-4
"""Bounds on the loss: the largest difference, and the mean of the signed differences, of any number of steps."""
MAX_NORM = 1e-3
"""Bound on the largest difference of the gradient norm, relative to TRL's."""
FIRST = 1e-5
"""Bound on the loss of the first step, where both have the same weights."""
ROWS, SEED = 160, 7
SECONDS = 300
"""Limit on each job."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one method, the same on both sides."""

    lr: float
    data: str
    """Our data.kind."""
    beta: float = 0.0
    """DPO's; 0 for SFT."""
    batch: int = 16
    """Rows (pairs) a step."""
    warmup_steps: int = 4
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    max_tokens: int = 64


RECIPES = {
    "sft": Recipe(lr=1e-3, data="demonstrations"),
    "dpo": Recipe(lr=3e-4, data="preferences", beta=0.1),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("placement.policy.tensor=2",)),
    "pp2": (2, ("placement.policy.pipeline=2", "placement.policy.stage_layers=[1,2]")),
    "tp2_dp2": (4, ("placement.policy.tensor=2",)),
}
AGAIN = "trl_again"
Curves = dict[str, Any]
"""{"loss", "grad_norm", "lr"}: a number a step; and what else a side tells of its steps."""


def main(arguments: list[str]) -> int:
    """Run both sides, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--method", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--ranks", type=int, default=2, help="layouts of ours that need more are left out")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--again", type=int, default=0, help="TRL once more, with as many microbatches a step")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes ours alone, to see it found")
    parser.add_argument("--json", type=Path, help="write everything there too")
    options = parser.parse_args(arguments)
    layouts = [name for name in options.layouts if LAYOUTS[name][0] <= options.ranks]
    comparison: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_task(work)
        theirs = run_trl(work, options)
        for method in options.method:
            check_inputs(work, method, theirs[method], options.steps)
            curves = {layout: run_ours(work, method, layout, options.steps, options.set) for layout in layouts}
            for layout in layouts:
                check_steps(f"{method} on {layout}", RECIPES[method], curves[layout], theirs[method], bool(options.set))
            if options.again:
                curves[AGAIN] = theirs[f"{method}_again"]
            comparison[method] = {name: compared(curve, theirs[method]) for name, curve in curves.items()}
            print(table(method, theirs[method], comparison[method]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(comparison, indent=2))
    return 0 if all(agrees(comparison[method][name]) for method in comparison for name in layouts) else 1


def write_task(work: Path) -> None:
    """work/model, and the rows of each method in the order of our stream's source."""
    from aligner.data.column_addition import ColumnAddition, ModelShape, write_task

    task = ColumnAddition(demonstrations=ROWS, demonstrated=ROWS, preferences=ROWS, prompts=1, heldout=1)
    write_task(work, task, ModelShape(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=384))


def run_trl(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run TRL in one process: {method: curves}, and {method_again: curves}."""
    runs = []
    for method in RECIPES:  # DPO starts from what SFT has saved
        write_in_our_order(work, method, options.steps)
        runs.append(peer_run(work, method, options.steps, 1))
        if options.again:
            runs.append(
                {**peer_run(work, method, options.steps, options.again), "name": f"{method}_again", "save": None}
            )
    selected_runs = [run for run in runs if run["method"] in options.method or run["save"]]
    spec = work / "peer.json"
    spec.write_text(json.dumps({"out": str(work / "peer_out.json"), "runs": selected_runs}))
    _run("TRL", [sys.executable, str(Path(__file__).with_name("trl_curves_peer.py")), str(spec)])
    curves: dict[str, Any] = json.loads((work / "peer_out.json").read_text())
    return curves


def peer_run(work: Path, method: str, steps: int, accumulation: int) -> dict[str, Any]:
    """One run's input for trl_curves_peer.py."""
    return {
        "name": method,
        "method": method,
        "model": str(start_of(work, method)),
        "rows": str(work / f"{method}.jsonl"),
        "folder": str(work / f"trl_{method}"),
        "save": str(start_of(work, "dpo")) if method == "sft" else None,
        "steps": steps,
        "accumulation": accumulation,
        "recipe": asdict(RECIPES[method]),
    }


def start_of(work: Path, method: str) -> Path:
    """The model folder that both sides start from."""
    return work / ("model" if method == "sft" else "sft_model")


def write_in_our_order(work: Path, method: str, steps: int) -> None:
    """Write the rows of all steps in the order of aligner's shuffled stream."""
    from aligner.data.stream import RowStream

    recipe = RECIPES[method]
    stream = RowStream((work / f"{recipe.data}.jsonl").read_text().splitlines(), SEED)
    (work / f"{method}.jsonl").write_text("".join(f"{row}\n" for row in stream.take(steps * recipe.batch)))


def run_ours(work: Path, method: str, layout: str, steps: int, extra: list[str]) -> dict[str, Any]:
    """A job: {"loss", "grad_norm", "lr", "tokens"}, a number a step."""
    recipe, (ranks, placement) = RECIPES[method], LAYOUTS[layout]
    run_dir = work / f"{method}_{layout}"
    names = ("lr", "warmup_steps", "schedule", "beta1", "beta2", "eps", "weight_decay", "clip_grad")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "aligner.main",
        f"algorithm={method}", f"data={recipe.data}", f"model.path={start_of(work, method)}",
        f"data.path={work / recipe.data}.jsonl", f"data.prompts_per_step={recipe.batch}", f"data.max_tokens={recipe.max_tokens}",
        f"run_dir={run_dir}", f"seed={SEED}", f"train.steps={steps}", "train.eval_every=0", "train.save=false",
        "train.report=false", "logging.console=false", "policy.micro_tokens=256",
        *(f"policy.optimizer.{name}={getattr(recipe, name)}" for name in names),
        *([f"algorithm.loss.beta={recipe.beta}"] if recipe.beta else []), *placement, *extra,
    ]  # fmt: skip
    _run(f"{method} on {layout}", command)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm", "lr", "tokens")}


def our_rows(work: Path, method: str, steps: int) -> Iterator[list[list[list[int]]]]:
    """[token ids, 0 or 1: trained] of every row of each step, by aligner's tokenization."""
    from aligner.data.demonstrations import tokenize_demonstrations
    from aligner.data.preferences import tokenize_preferences
    from aligner.data.sources.open import open_source
    from aligner.data.sources.source import all_rows
    from aligner.data.stream import RowStream
    from aligner.data.tokenizer import load_tokenizer

    recipe = RECIPES[method]
    source, tokenizer = all_rows(open_source(work / f"{recipe.data}.jsonl")), load_tokenizer(work / "model")
    stream: RowStream[Any]
    if method == "sft":
        stream = RowStream([(row,) for row in tokenize_demonstrations(source, tokenizer, recipe.max_tokens)[0]], SEED)
    else:
        pairs = tokenize_preferences(source, tokenizer, recipe.max_tokens)[0]
        stream = RowStream([(pair.chosen, pair.rejected) for pair in pairs], SEED)
    for _ in range(steps):
        taken = [row for group in stream.take(recipe.batch) for row in group]
        yield [[list(row.tokens), [int(trained) for trained in row.mask]] for row in taken]


def check_inputs(work: Path, method: str, theirs: dict[str, Any], steps: int) -> None:
    """Check that both sides had the same token ids, masks and order, and apply weight decay to the same parameters."""
    for step, (ours, trl_rows) in enumerate(zip(our_rows(work, method, steps), theirs["rows"], strict=True), start=1):
        if ours != trl_rows:
            row = next(i for i, (own_rows, other) in enumerate(zip(ours, trl_rows, strict=True)) if own_rows != other)
            raise SystemExit(f"{method}, step {step}: row {row} is {trl_rows[row]} in TRL and {ours[row]} here.")
    groups = theirs["decayed"]
    if groups["one_dim"] or groups["more_dims_not"]:
        raise SystemExit(f"{method}: TRL's weight decay is not on all parameters of two or more dimensions: {groups}.")


def check_steps(what: str, recipe: Recipe, ours: Curves, theirs: Curves, changed: bool) -> None:
    """Each step trained as many tokens at the same learning rate; DPO begins at log 2, since both models are the same."""
    tokens = [sum(sum(trained) for _, trained in rows) for rows in theirs["rows"]]
    if ours["tokens"] != tokens:
        raise SystemExit(f"{what}: {ours['tokens']} trained tokens, and TRL's are {tokens}.")
    differing = [pair for pair in zip(ours["lr"], theirs["lr"], strict=True) if abs(pair[0] - pair[1]) > 1e-12]
    if differing and not changed:
        raise SystemExit(f"{what}: learning rate {differing[0][0]}, and TRL's is {differing[0][1]}.")
    if recipe.beta and max(abs(side["loss"][0] - math.log(2)) for side in (ours, theirs)) > 1e-4:
        raise SystemExit(f"{what}: the first loss is {ours['loss'][0]}, and TRL's {theirs['loss'][0]}, not log 2.")


def compared(ours: Curves, theirs: Curves) -> dict[str, Any]:
    """Ours and TRL's with the differences (ours - TRL's) of every step, and the figures that they come to."""
    comparison: dict[str, Any] = {}
    for name in ("loss", "grad_norm"):
        difference = [our_value - trl_value for our_value, trl_value in zip(ours[name], theirs[name], strict=True)]
        comparison[name] = {
            "first": difference[0],
            "max": max(map(abs, difference)),
            "max_relative": max(abs(d) / abs(trl_value) for d, trl_value in zip(difference, theirs[name], strict=True)),
            "mean": statistics.fmean(difference),
            "difference": difference,
            "ours": ours[name],
            "trl": theirs[name],
        }
    return comparison


def agrees(comparison: dict[str, Any]) -> bool:
    """Whether the curves are within the bounds."""
    loss, norm = comparison["loss"], comparison["grad_norm"]
    close = loss["max"] < MAX_LOSS and abs(loss["mean"]) < MEAN_LOSS and abs(loss["first"]) < FIRST
    return close and norm["max_relative"] < MAX_NORM


def table(method: str, theirs: Curves, comparison: dict[str, dict[str, Any]]) -> str:
    """A line a step with TRL's values and the differences; then the figures of each layout."""
    head = f"{'step':>5}{'loss':>11}{'norm':>10}" + "".join(f"{f'{name}: loss, norm':>26}" for name in comparison)
    lines = [f"{method}: TRL's values, and differences from them", head]
    for i, (loss, norm) in enumerate(zip(theirs["loss"], theirs["grad_norm"], strict=True)):
        each = [
            (layout["loss"]["difference"][i], layout["grad_norm"]["difference"][i]) for layout in comparison.values()
        ]
        lines.append(f"{i + 1:>5}{loss:>11.6f}{norm:>10.5f}" + "".join(f"{a:>14.1e}{b:>12.1e}" for a, b in each))
    for name, layout in comparison.items():
        lines += [
            f"  {name:<12}{quantity:<10} max {figures['max']:.1e} ({figures['max_relative']:.1e} of it), "
            f"mean {figures['mean']:+.1e}, first {figures['first']:+.1e}"
            for quantity, figures in layout.items()
        ]
        lines[-1] += "" if name == AGAIN or agrees(layout) else "   OUT OF BOUNDS"
    return "\n".join(lines)


def _run(what: str, command: list[str]) -> None:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    # A session of its own, so that a job over its limit goes with all its ranks.
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{what} failed, or took more than {SECONDS} s:\n{out[-2000:]}\n{err[-6000:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
