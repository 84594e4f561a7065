"""Activation memory of an update on one long row, by context-parallel size: peak bytes per rank above the idle state.

python tools/bench/context_memory.py [--tokens 8192] [--layers 4] [--context 1 2] [--tensor 1] [--recompute none ...]

One line of JSON for each size and kind of recompute. On a CPU the tensors that live are added up (what a kernel takes
for itself is not seen); with CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

import torch

from aligner.data.column_addition import ModelShape, write_model
from aligner.data.samples import Samples
from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.policy import Policy
from tools.bench.live_tensors import peak_bytes

SHAPE: dict[str, int] = {"hidden": 256, "heads": 8, "head_dim": 32, "ffn": 768}


def one_row(tokens: int, vocab: int) -> Samples:
    """One row; all tokens but the first are trained."""
    ones = torch.ones(1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, vocab, (1, tokens), generator=generator)
    return Samples(tokens_BT, ones, ones * tokens, torch.arange(tokens)[None] > 0, ones, [{}])


def measure(world: World, arguments: argparse.Namespace, recompute: str) -> int:
    """Peak of the second update; buffers and optimizer state exist since the first."""
    spec = read_spec(arguments.folder)
    mesh = Mesh(tuple(range(world.size)), arguments.tensor, context=world.size // arguments.tensor, name="policy")
    config = PolicyConfig(micro_tokens=1, recompute=recompute, optimizer=OptimizerConfig(lr=0.0))
    policy = Policy(recompute, world, mesh, spec, config, sequence_parallel=arguments.tensor > 1)

    def likelihood(policy_logp_BT: torch.Tensor, *, mask_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return -torch.where(mask_BT, policy_logp_BT, 0.0), {}

    ref = policy.scatter(one_row(arguments.tokens, spec.vocab))
    policy.update(likelihood, ref)
    return peak_bytes(lambda: policy.update(likelihood, ref), world.device)


def measure_all(arguments: argparse.Namespace) -> None:
    """Run one rank of the job."""
    world = World(600)
    for recompute in arguments.recompute:
        peak = torch.tensor([measure(world, arguments, recompute)])
        peak = max(int(n) for n in world_values(world, peak))
        if world.rank == 0:
            sizes = {"context": world.size // arguments.tensor, "tensor": arguments.tensor, "tokens": arguments.tokens}
            print(json.dumps({**sizes, "recompute": recompute, "peak_mib": round(peak / 2**20, 1)}), flush=True)
    world.leave()


def world_values(world: World, value: torch.Tensor) -> list[torch.Tensor]:
    """All-gather a number: every rank's."""
    values = [torch.zeros_like(value) for _ in range(world.size)]
    torch.distributed.all_gather(values, value)
    return values


def main() -> int:
    """The command: one job for each size. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2, help="of 8")
    parser.add_argument("--context", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    arguments = parser.parse_args()
    if arguments.folder:
        measure_all(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), ModelShape(**SHAPE, layers=arguments.layers, kv_heads=arguments.kv_heads), seed=0)
        for size in arguments.context:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size * arguments.tensor}"]
            done = subprocess.run([sys.executable, *launch, __file__, *sys.argv[1:], "--folder", folder])
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
