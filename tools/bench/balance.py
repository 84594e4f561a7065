"""Sequence-length balancing: idle time of data-parallel ranks and padding, for three ways to distribute skewed lengths.

python tools/bench/balance.py [--batches 15] [--prompts 16] [--group 8] [--no-update] [--out FILE.json]

Lengths as in a GRPO batch: each prompt's is log-normal (sigma 1.25), its samples vary around it (sigma 0.4), capped at 32
times the median; 16 prompts per shard. Methods: contiguous rows (naive), longest group first by tokens, and `partition` by
the model's estimated FLOPs including attention. First by modelled cost for 2, 4 and 8 shards (median over batches); then
the measured update of a real Megatron policy on 2 ranks of this machine with each method, interleaved batch by batch. A
rank's seconds are CPU time, which excludes waiting.
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

from aligner.spmd.cost import TOKENS, Cost
from aligner.spmd.partition import Shares, idle, of_groups, partition
from aligner.trainer.packing import microbatches, row_units
from aligner.trainer.prefix_attention import attended
from aligner.trainer.row_contexts import separate, whole_rows

ROOT = Path(__file__).resolve().parent.parent.parent
LARGE = Cost(2 * 7_500_000_000, 2 * 32 * 32 * 128)
"""An 8B model: 32 layers, 32 heads of 128; weights without the embedding."""
TAIL = 32
"""Longest length, as a multiple of the median."""
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
    """The same number of groups on each shard, in order."""
    groups = len(lengths) // group
    ends = [groups * shard // shards * group for shard in range(shards + 1)]
    return tuple(tuple(range(*bounds)) for bounds in pairwise(ends))


def by_tokens(lengths: list[int], shards: int, group: int, cost: Cost) -> Shares:
    """Greedy: longest group first, to the shard with the fewest tokens."""
    tokens = of_groups(lengths, group, TOKENS)
    rows_of: list[list[int]] = [[] for _ in range(shards)]
    load = [0] * shards
    for number in sorted(range(len(tokens)), key=lambda number: (-tokens[number], number)):
        shard = load.index(min(load))
        load[shard] += tokens[number]
        rows_of[shard] += range(number * group, (number + 1) * group)
    return tuple(tuple(sorted(rows)) for rows in rows_of)


def by_cost(lengths: list[int], shards: int, group: int, cost: Cost) -> Shares:
    """The product's own partition."""
    return partition(lengths, shards, group, 1, cost)


DEALS: dict[str, Deal] = {"contiguous": contiguous, "tokens": by_tokens, "cost": by_cost}


def padding(lengths: list[int], shares: Shares, budget: int) -> float:
    """Fraction of padding in the tokens computed by attention, in microbatches of `budget` tokens."""
    lengths_of = [[lengths[row] for row in share] for share in shares]
    packed = [
        tuple(rows[i] for i in batch)
        for rows in lengths_of
        for batch in microbatches(row_units(separate(whole_rows(torch.tensor(rows))), budget), budget)
    ]
    return 1 - sum(lengths) / sum(attended(rows, (-1,) * len(rows)) for rows in packed)


def modelled(batches: int, prompts: int, group: int) -> dict[str, dict[str, float]]:
    """ "shards deal" -> idle and padding, medians over the batches; median length 512, an 8B model."""
    results = {}
    for shards in (2, 4, 8):
        lengths = [draw(prompts * shards, group, 512, seed) for seed in range(batches)]
        for name, deal in DEALS.items():
            shares = [deal(rows, shards, group, LARGE) for rows in lengths]
            pairs = list(zip(lengths, shares, strict=True))
            results[f"{shards} shards, {name}"] = {
                "idle": median(idle(rows, share, group, 1, LARGE) for rows, share in pairs),
                "padding": median(padding(rows, share, 16384) for rows, share in pairs),
            }
    return results


def write_model(folder: Path) -> None:
    """A small model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"max_position_embeddings": 2048, "tie_word_embeddings": False, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest)).save_pretrained(folder)


def updates(batches: int, seconds: float) -> dict[str, dict[str, float]]:
    """Method -> measurements on 2 ranks of this machine; see balance_rank.py."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(Path(__file__).with_name("balance_rank.py")), str(batches), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, timeout=seconds, env=environment, stdout=subprocess.DEVNULL)
        results: dict[str, dict[str, float]] = json.loads((Path(folder) / "found.json").read_text())
        return results


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=15, help="number of batches, over which the median is taken")
    parser.add_argument("--prompts", type=int, default=16, help="prompts for each shard of a modelled batch")
    parser.add_argument("--group", type=int, default=8, help="samples of each prompt in a modelled batch")
    parser.add_argument("--no-update", action="store_true", help="only the modelled part")
    parser.add_argument("--seconds", type=float, default=1500, help="time limit of the measured part")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args()
    results = {"modelled": modelled(args.batches, args.prompts, args.group)}
    if not args.no_update:
        results["measured on 2 ranks"] = updates(args.batches, args.seconds)
    for title, rows in results.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:22}" + "".join(f"{key} {value:<10.4g}" for key, value in row.items()))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
