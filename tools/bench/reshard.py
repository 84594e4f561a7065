"""Benchmark of weight transfers: aligner's, other frameworks' methods, and the limit of the machine.

python tools/bench/reshard.py [--repeats 7] [--cases tp2-2xtp1 ...] [--engine]

For each case, over real gloo ranks and a model of about 55M fp32 parameters, the median over the repeats of the slowest
rank's seconds:

  ours       plan and executor, proof on; without the proof; and over gloo, as between hosts
  limit      the same bytes through bare batched sends, and bare memcpy of what stays, nothing else
  copies     what is left of the limit without the sends: the least that memory shared by the ranks can do
  gather     every full tensor gathered on every rank, then cut there: what most frameworks do
  megatron   megatron.core.resharding between two Megatron models (dense models only: it garbles experts)

With --engine the destination is a real vLLM engine: ours with re-layout and proof, without reading back the kernels that
vLLM packs, and without any proof, against gathering full tensors and handing them to the engine's own loader
(reload_weights).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Case:
    """One transfer on `ranks` ranks, both sides on all of them."""

    ranks: int
    train: dict[str, int]
    infer: int
    """Tensor-parallel size of the replicas."""
    experts: bool = False


CASES = {
    "tp2-2xtp1": Case(2, {"tensor": 2}, 1),
    "pp2-tp2": Case(2, {"pipeline": 2}, 2),
    "ep2-tp2": Case(2, {"expert": 2}, 2, experts=True),
    "tp2pp2-tp4": Case(4, {"tensor": 2, "pipeline": 2}, 4),
    "tp2pp2-2xtp2": Case(4, {"tensor": 2, "pipeline": 2}, 2),
}
DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "dtype": "float32", "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {
    **DENSE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 6,
    "vocab_size": 16000, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one torchrun job per case and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--engine", action="store_true", help="a real vLLM engine as the destination")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(arguments)
    results = {}
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            config = EXPERTS if CASES[name].experts else DENSE
            (Path(folder) / "config.json").write_text(json.dumps(config))
            results[name] = run_case(name, folder, args.repeats, args.engine)
        print(table(name, results[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return 0


def run_case(name: str, folder: str, repeats: int, engine: bool) -> dict[str, Any]:
    """The measurements of one case, from its own torchrun job."""
    out = Path(folder) / "figures.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CASES[name].ranks}",
        str(Path(__file__).with_name("reshard_rank.py")), name, folder, str(repeats), str(int(engine)), str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[:6000]}")
    return json.loads(out.read_text())


def table(name: str, results: dict[str, Any]) -> str:
    """The case's lines: seconds, and their ratio to ours."""
    case = CASES[name]
    ours = results["seconds"]["ours"]
    lines = [
        f"{name}: {results['parameters'] / 1e6:.1f}M parameters on {case.ranks} ranks, {results['moved'] / 2**20:.1f} MiB "
        f"moved ({results['moved'] / results['minimum']:.3f} of the minimum), {results['local'] / 2**20:.1f} MiB local, "
        f"peak extra {results['extra'] / results['bucket']:.2f} buckets of {results['bucket'] / 2**20:.0f} MiB"
    ]
    lines += [
        f"  {method:<24}{seconds * 1e3:9.1f} ms   {seconds / ours:6.2f} x ours"
        for method, seconds in results["seconds"].items()
    ]
    return "\n".join(lines)


def median_of_slowest(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Way -> median over the repeats of the slowest rank's seconds; the ways take turns, after one round of each.

    In another order each time: whoever comes after one that takes much memory finds cold caches.
    """
    import torch
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeats + 1):
        for way in random.Random(number).sample(list(ways), len(ways)):
            dist.barrier()
            started = time.perf_counter()
            ways[way]()
            taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number:
                seconds[way].append(float(taken))
    return {way: statistics.median(results) for way, results in seconds.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
