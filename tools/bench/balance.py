"""How long do data-parallel ranks wait for each other, and how much is computed for nothing? Skewed lengths, by three deals.

python tools/bench/balance.py [--batches 15] [--prompts 16] [--group 8] [--no-update] [--out FILE.json]

Lengths as of a batch of GRPO: each prompt's is log-normal (sigma 1.25), its samples vary around it (sigma 0.4), none
is beyond 32 times the median; 16 prompts for each shard. Deals: contiguous rows (naive), longest group first by tokens, and `partition` by the
model's cost, attention included. First by modelled cost for 2, 4 and 8 shards (the median of the batches); then, on this
machine, the seconds of a real Megatron policy's update on 2 ranks under each deal, interleaved, batch by batch. A
rank's seconds are its processor time, in which it does not wait.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import Shares, idle, of_groups, partition
from aligner.trainer.megatron.attention_calls import attended
from aligner.trainer.packing import microbatches

ROOT = Path(__file__).resolve().parent.parent.parent
LARGE = Cost(2 * 7_500_000_000, 2 * 32 * 32 * 128)
"""A model of 8 billion weights: 32 layers, 32 heads of 128, of the weights all but the embedding."""
TAIL = 32
"""The longest length, in medians."""
Deal = Callable[[list[int], int, int, Cost], Shares]


def draw(prompts: int, group: int, middle: int, seed: int) -> list[int]:
    """Lengths of a batch's rows, groups of one prompt together."""
    dice = random.Random(seed)
    means = [dice.gauss(0, 1.25) for _ in range(prompts)]
    return [
        min(TAIL * middle, max(2, round(middle * 2.718281828 ** (mean + dice.gauss(0, 0.4)))))
        for mean in means
        for _ in range(group)
    ]


def contiguous(lengths: list[int], shards: int, group: int, cost: Cost) -> Shares:
    """As many groups on each shard, in the order in which they come."""
    groups = len(lengths) // group
    ends = [groups * shard // shards * group for shard in range(shards + 1)]
    return tuple(tuple(range(*bounds)) for bounds in pairwise(ends))


def by_tokens(lengths: list[int], shards: int, group: int, cost: Cost) -> Shares:
    """Longest group first to the shard with the fewest tokens, and nothing more."""
    tokens = of_groups(lengths, group, TOKENS)
    held: list[list[int]] = [[] for _ in range(shards)]
    load = [0] * shards
    for number in sorted(range(len(tokens)), key=lambda number: (-tokens[number], number)):
        shard = load.index(min(load))
        load[shard] += tokens[number]
        held[shard] += range(number * group, (number + 1) * group)
    return tuple(tuple(sorted(rows)) for rows in held)


def by_cost(lengths: list[int], shards: int, group: int, cost: Cost) -> Shares:
    """What the roles do."""
    return partition(lengths, shards, group, 1, cost)


DEALS: dict[str, Deal] = {"contiguous": contiguous, "tokens": by_tokens, "cost": by_cost}


def padding(lengths: list[int], shares: Shares, budget: int) -> float:
    """The share of the computed tokens that pads attention calls, in microbatches of `budget` tokens."""
    held = [[lengths[row] for row in share] for share in shares]
    packed = [tuple(rows[i] for i in batch) for rows in held for batch in microbatches(rows, budget)]
    return 1 - sum(lengths) / sum(map(attended, packed))


def modelled(batches: int, prompts: int, group: int) -> dict[str, dict[str, float]]:
    """ "shards deal" -> idle and padding, medians over the batches; median length 512, an 8B model."""
    found = {}
    for shards in (2, 4, 8):
        lengths = [draw(prompts * shards, group, 512, seed) for seed in range(batches)]
        for name, deal in DEALS.items():
            shares = [deal(rows, shards, group, LARGE) for rows in lengths]
            pairs = list(zip(lengths, shares, strict=True))
            found[f"{shards} shards, {name}"] = {
                "idle": median(idle(rows, share, group, 1, LARGE) for rows, share in pairs),
                "padding": median(padding(rows, share, 16384) for rows, share in pairs),
            }
    return found


def updates(batches: int, seconds: float) -> dict[str, dict[str, float]]:
    """Deal -> what 2 ranks of this machine measure; see balance_rank.py."""
    from tools.bench.balance_rank import write_model

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(Path(__file__).with_name("balance_rank.py")), str(batches), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, timeout=seconds, env=environment, stdout=subprocess.DEVNULL)
        found: dict[str, dict[str, float]] = json.loads((Path(folder) / "found.json").read_text())
        return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=15, help="batches of which the median is told")
    parser.add_argument("--prompts", type=int, default=16, help="prompts for each shard of a modelled batch")
    parser.add_argument("--group", type=int, default=8, help="samples of each prompt in a modelled batch")
    parser.add_argument("--no-update", action="store_true", help="only the modelled part")
    parser.add_argument("--seconds", type=float, default=1500, help="time limit of the measured part")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args()
    found = {"modelled": modelled(args.batches, args.prompts, args.group)}
    if not args.no_update:
        found["measured on 2 ranks"] = updates(args.batches, args.seconds)
    for title, rows in found.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:22}" + "".join(f"{key} {value:<10.4g}" for key, value in row.items()))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
