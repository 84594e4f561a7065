"""One rank of tools/bench/balance.py: optimizer steps of a Megatron policy on the same batches, distributed by each method.

Arguments: the number of batches, and a folder with model/, where rank 0 writes found.json: {deal: {figure: median over
the batches}}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist

from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.objective.losses import negative_log_likelihood
from aligner.spmd import batch_ops
from aligner.spmd.mesh import Mesh
from aligner.spmd.partition import idle
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tools.bench.balance import DEALS, draw

PROMPTS, GROUP, MIDDLE, BUDGET = 32, 4, 32, 2048


def batch(seed: int) -> Samples:
    """Random tokens in rows of skewed lengths."""
    length_B = torch.tensor(draw(PROMPTS, GROUP, MIDDLE, seed))
    rows, width = len(length_B), int(length_B.max())
    inside_BT = torch.arange(width) < length_B[:, None]
    tokens_BT = torch.randint(2, 512, (rows, width), generator=torch.Generator().manual_seed(seed)) * inside_BT
    mask_BT = inside_BT & (torch.arange(width) > 0)
    ones_B = torch.ones(rows, dtype=torch.long)
    return Samples(tokens_BT, ones_B, length_B, mask_BT, torch.arange(rows), [{} for _ in range(rows)])


def step(policy: Policy, samples: Samples, deal: str) -> dict[str, float]:
    """One optimizer step with one method: measured and modelled idle time, padding, seconds."""
    lengths = samples.length_B.tolist()
    shares = DEALS[deal](lengths, policy.mesh.data, GROUP, policy.cost)
    own_rows = batch_ops.take(samples, shares[policy.shard or 0])
    own_rows = batch_ops.fit_width(own_rows, int(own_rows.length_B.max()))
    dist.barrier()
    wall, busy = time.perf_counter(), time.process_time()
    row = policy._step(negative_log_likelihood, 1, own_rows, {})
    times = (time.process_time() - busy, time.perf_counter() - wall)
    all_times: list[Any] = [None] * policy.mesh.size
    dist.all_gather_object(all_times, times)
    seconds = [busy for busy, _ in all_times]
    return {
        "idle": 1 - fmean(seconds) / max(seconds),
        "modelled": idle(lengths, shares, GROUP, 1, policy.cost),
        "padding": row["padding"],
        "busiest": max(seconds),
        "wall": max(wall for _, wall in all_times),
    }


def main() -> None:
    batches, folder = int(sys.argv[1]), Path(sys.argv[2])
    world = World(600)
    mesh = Mesh(tuple(range(world.size)), name="policy")
    policy = Policy("policy", world, mesh, read_spec(folder / "model"), PolicyConfig(micro_tokens=BUDGET))
    step(policy, batch(-1), "cost")  # warm-up
    rows: dict[str, list[dict[str, float]]] = {deal: [] for deal in DEALS}
    for seed in range(batches):
        samples = batch(seed)
        for deal in DEALS:
            rows[deal].append(step(policy, samples, deal))
    if world.rank == 0:
        medians = {
            deal: {key: median(row[key] for row in results) for key in results[0]} for deal, results in rows.items()
        }
        for deal, results in rows.items():  # ratios inside a batch, so that batches of any size count alike
            for key in ("busiest", "wall"):
                medians[deal][f"{key}_of_contiguous"] = median(
                    row[key] / first[key] for row, first in zip(results, rows["contiguous"], strict=True)
                )
        (folder / "found.json").write_text(json.dumps(medians))
    world.leave()


if __name__ == "__main__":
    main()
