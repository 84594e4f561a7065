"""One rank of tools/bench/engines.py: JOB.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from aligner.data.samples import Samples  # noqa: E402
from aligner.models.read_spec import read_spec  # noqa: E402
from aligner.objective.losses import negative_log_likelihood  # noqa: E402
from aligner.roles.weight_sync import WeightSyncs  # noqa: E402
from aligner.rollout.config import RolloutConfig, Sampling  # noqa: E402
from aligner.rollout.role import Rollout  # noqa: E402
from aligner.spmd.memory import trim  # noqa: E402
from aligner.spmd.mesh import Mesh  # noqa: E402
from aligner.spmd.world import World  # noqa: E402
from aligner.trainer.config import OptimizerConfig, PolicyConfig  # noqa: E402
from aligner.trainer.engines import BACKENDS  # noqa: E402
from aligner.trainer.policy import Policy  # noqa: E402

TOKENS = 128
MIB_PER_GIB = 1024
Found = dict[str, dict[str, float]]


class Bench:
    """The engines' policies on this rank, of one model, and the batch that each is updated on."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.world, self.steps = World(), job["steps"]
        self.mesh, self.spec = Mesh(tuple(range(self.world.size)), name="policy"), read_spec(job["model"])
        rows, prompt = job["rows"], TOKENS // 4
        tokens_BT = torch.randint(3, 100, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
        mask_BT = (torch.arange(TOKENS) >= prompt).expand(rows, TOKENS)
        lengths = torch.full((rows,), prompt), torch.full((rows,), TOKENS)
        self.samples = Samples(tokens_BT, *lengths, mask_BT, torch.arange(rows), [{}] * rows, 0.0 * mask_BT)
        for name, backend in BACKENDS.items():  # whatever is measured, the libraries of all are there
            backend.engine_type()
            backend.check(self.spec, self.mesh, PolicyConfig(engine=name), False, self.world.device.type == "cpu")
        self.start_memory()
        self.policies = {name: self.policy(name) for name in job["engines"]}

    def policy(self, engine: str) -> Policy:
        """A policy on this engine."""
        config = PolicyConfig(engine=engine, optimizer=OptimizerConfig(lr=1e-9))
        more = {"total_steps": 1000, "max_response": TOKENS, "syncs": WeightSyncs()}
        return Policy(engine, self.world, self.mesh, self.spec, config, **more)

    def update(self, policy: Policy) -> None:
        """One optimizer step."""
        policy.update(negative_log_likelihood, policy.scatter(self.samples)).gather()

    def timed(self, call: Callable[[Policy], Any]) -> tuple[dict[str, float], dict[str, float]]:
        """Engine -> median seconds of the slowest rank, and of the processor; the engines take turns, and begin them in turn."""
        seconds: dict[str, list[list[float]]] = {name: [] for name in self.policies}
        for number in range(self.steps + 1):
            names = list(self.policies)
            for name in names if number % 2 else names[::-1]:
                dist.barrier()
                start, used = time.perf_counter(), time.process_time()
                call(self.policies[name])
                taken = torch.tensor([time.perf_counter() - start, time.process_time() - used], dtype=torch.float64)
                dist.all_reduce(taken, dist.ReduceOp.MAX)
                if number:
                    seconds[name].append(taken.tolist())
        wall, processor = (
            {name: statistics.median(row[column] for row in rows) for name, rows in seconds.items()}
            for column in (0, 1)
        )
        return wall, processor

    def updated(self) -> Found:
        """Seconds of an update."""
        wall, processor = self.timed(self.update)
        return {"update": wall, "cpu": processor}

    def synced(self) -> Found:
        """Milliseconds of a sync into a vLLM engine on each rank."""
        config = RolloutConfig(max_model_len=64, max_num_seqs=4, kv_cache_mib=8)
        rollout = Rollout("rollout", self.world, self.mesh, self.spec, config, Sampling(max_tokens=8), 0)
        wall, _ = self.timed(lambda policy: policy.reshard_to(rollout))
        return {"sync": {name: 1000 * value for name, value in wall.items()}}

    def start_memory(self) -> None:
        """From here on memory counts."""
        trim()
        self.meter = self.world.residency.meter  # role calls reset the kernel's mark, so no other may read it
        self.meter.take()
        self.before = self.meter.take()["peak"]

    def memory(self) -> Found:
        """Engine -> MiB of the rank with the most, over two updates of the one engine that is there."""
        ((name, policy),) = self.policies.items()
        for _ in range(2):
            trim()  # as a job does before each role call
            self.update(policy)
        peak = torch.tensor(self.meter.take()["peak"] - self.before)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return {"memory": {name: MIB_PER_GIB * float(peak)}}


def main(arguments: Sequence[str]) -> None:
    """Measure what the job asks for; rank 0 writes it."""
    job = json.loads(Path(arguments[0]).read_text())
    torch.set_num_threads(1)
    bench = Bench(job)
    measured = {"update": bench.updated, "sync": bench.synced, "memory": bench.memory}
    found: Found = {}
    for name in job["what"]:
        found |= measured[name]()
    if bench.world.rank == 0:
        Path(job["out"]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # engines need no orderly end here


if __name__ == "__main__":
    main(sys.argv[1:])
