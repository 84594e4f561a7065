"""How the phases of a GRPO step grow with parameters, tokens, group and ranks: one factor at a time, the others as they stand.

python tools/bench/growth.py                                     all factors: ten minutes
python tools/bench/growth.py --factors tokens group --json runs/growth.json --write docs/performance.md

The step that the factors start from: 9.8M parameters, 8 prompts of 13 tokens, groups of 8, responses of 64 tokens exactly,
fp32, 2 ranks x 1 thread. Seconds are medians over the steps, without the first two. The power p of a phase fits
seconds ~ factor^p from a factor's first to its last value; a phase that the factor does not change has 0.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import alternation  # noqa: E402
import grpo  # noqa: E402

SIZE, TOKENS, GROUP, RANKS, PROMPT = "9.8M", 64, 8, 2, 13
FACTORS: dict[str, list[float]] = {
    "parameters": [0.66, 9.8, 55],
    "tokens": [16, 64, 256],
    "group": [2, 8, 32],
    "ranks": [1, 2],
}
"""Values by factor; parameters in millions, tokens of a response, samples of a prompt."""
PHASES = ("generate", "update", "sync", "other", "step")


def measure(factor: str, value: float, steps: int) -> dict[str, float]:
    """Median seconds of each phase, where `factor` is `value`."""
    size = f"{value:g}M" if factor == "parameters" else SIZE
    tokens = int(value) if factor == "tokens" else TOKENS
    group = int(value) if factor == "group" else GROUP
    whole = -(-(PROMPT + tokens) // 32) * 32
    extra = [
        f"sampling.max_tokens={tokens}", f"rollout.max_model_len={whole}", f"algorithm.group_size={group}",
        f"rollout.max_num_seqs={grpo.PROMPTS * group}",
    ]  # fmt: skip
    ranks = int(value) if factor == "ranks" else RANKS
    with tempfile.TemporaryDirectory() as folder:
        runs = [grpo.Bench(grpo.Case(size, "fixed"), steps, Path(folder), extra, ranks).aligner()]
    return {phase: alternation.median(runs, phase) for phase in PHASES}


def report(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each value of each factor, and the power of each phase, as Markdown."""
    lines = [
        f"| factor | value | {' | '.join(PHASES)} |",
        "| " + " | ".join("---" for _ in range(len(PHASES) + 2)) + " |",
    ]
    for factor, by_value in results.items():
        values = sorted(by_value, key=float)
        for value in values:
            cells = [alternation.figure(by_value[value][phase]) for phase in PHASES]
            lines.append(f"| {factor} | {value} | {' | '.join(cells)} |")
        first, last = values[0], values[-1]
        times = math.log(float(last) / float(first))
        powers = [math.log(by_value[last][phase] / by_value[first][phase]) / times for phase in PHASES]
        lines.append(f"| | power | {' | '.join(f'{power:.2f}' for power in powers)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="*", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--steps", type=int, default=4, help="of each run, after two that are not counted")
    parser.add_argument("--json", type=Path, help="add to what this file holds")
    parser.add_argument("--write", type=Path, help="replace the table in this file, between its markers")
    options = parser.parse_args(arguments)
    alternation.end_on_sigterm()
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for factor in options.factors:
        for value in FACTORS[factor]:
            results.setdefault(factor, {})[f"{value:g}"] = measure(factor, value, options.steps)
            print(f"{factor} {value:g}: {results[factor][f'{value:g}']}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results))
    text = report(results)
    print(text)
    if options.write:
        alternation.write_between(options.write, "tools/bench/growth.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
