"""Memory cost of colocation: peak resident size of a GRPO step compared with training and generating alone.

python tools/bench/residency.py [--micro-tokens 2048] [--kv-cache-mib 512] [--reference] [--cases train ...] [--json FILE]

One rank, a model of about 110M fp32 parameters with random weights, 16 samples of 64 + 64 tokens (one microbatch), two steps. Each case
runs in a process of its own that has imported both engines:

  train        the policy alone: two updates on a batch of the same shape
  generate     the engine alone
  off, auto    a GRPO step of policy and engine (--reference: and a reference) on one rank, without and with residency

The ratio is auto's largest size over that of the larger one alone plus one message of the resharding (32 MiB).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "vocab_size": 32000,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "dtype": "float32", "eos_token_id": 1,
}  # fmt: skip
PROMPTS, GROUP, PROMPT, RESPONSE, STEPS = 4, 4, 64, 64, 2
CASES = ("train", "generate", "off", "auto")
BUCKET = 32 / 1024
"""GiB."""


def main(arguments: list[str]) -> int:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-mib", type=int, default=512)
    parser.add_argument("--reference", action="store_true", help="a reference model beside the policy")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        return _child(args)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for case in args.cases:
            results[case] = _run(case, folder, arguments)
            print(f"{case}: {json.dumps({name: round(value, 3) for name, value in results[case].items()})}", flush=True)
    names = sorted({name for row in results.values() for name in row})
    print("GiB        " + "".join(f"{name:>12}" for name in names))
    for case, row in results.items():
        print(f"{case:11}" + "".join(f"{row[name]:12.2f}" if name in row else f"{'-':>12}" for name in names))
    if {"train", "generate"} <= results.keys():
        alone = max(results["train"]["peak"], results["generate"]["peak"]) + BUCKET
        for case in ("off", "auto"):
            if case in results:
                print(
                    f"{case}: {results[case]['peak'] / alone:.3f} x (larger one alone + one bucket = {alone:.2f} GiB)"
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


def write_model(folder: Path) -> None:
    """A checkpoint of random weights."""
    import torch
    from safetensors.torch import save_file

    from aligner.models.read_spec import read_spec
    from aligner.models.tensors import logical_tensors

    (folder / "config.json").write_text(json.dumps(MODEL))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in ((name, tuple(shape)) for name, shape in logical_tensors(read_spec(folder)).items())
    }
    print(f"{sum(tensor.numel() for tensor in tensors.values()) / 1e6:.1f}M parameters", flush=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _run(case: str, folder: str, arguments: list[str]) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = Path(folder) / f"{case}.json"
    command = [sys.executable, __file__, *arguments, "--case", case, "--folder", folder]
    subprocess.run(command, check=True, env={**os.environ, "MASTER_PORT": port, "PYTHONPATH": str(ROOT)})
    figures: dict[str, float] = json.loads(out.read_text())
    return figures


def _child(given: argparse.Namespace) -> int:
    """One case: {phase: GiB}, "peak" over the whole life of the process, seconds of the last step."""
    from aligner.run.library_warnings import ignore_library_notes

    ignore_library_notes()
    import vllm  # noqa: F401  (both engines are imported in every case)

    import aligner.roles.build  # noqa: F401
    from aligner.spmd.residency_config import ResidencyConfig
    from aligner.spmd.world import World

    world = World(600)
    world.residency.config = ResidencyConfig(mode="auto" if given.case == "auto" else "off")
    figures = {"imported": world.residency.meter.take()["peak"]}
    step = _steps(world, given)
    figures |= {"built": world.residency.meter.take()["peak"]}
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        figures["seconds"] = time.perf_counter() - start
        for name, size in world.residency.meter.take().items():
            figures[name] = max(figures.get(name, 0.0), size)
    figures["peak"] = max(figures["peak"], figures["built"])
    figures = {name: size for name, size in figures.items() if "(" not in name}
    (given.folder / f"{given.case}.json").write_text(json.dumps(figures))
    world.leave()


def _steps(world: Any, given: argparse.Namespace) -> Any:
    """Build the roles of a case and return its step function."""
    import torch

    from aligner.data.prompts import Prompt
    from aligner.data.samples import Samples
    from aligner.models.read_spec import read_spec
    from aligner.objective.losses import clipped_surrogate
    from aligner.roles.weight_sync import WeightSyncs
    from aligner.rollout.config import RolloutConfig, Sampling
    from aligner.rollout.role import Rollout
    from aligner.spmd.mesh import Mesh
    from aligner.trainer.config import OptimizerConfig, PolicyConfig
    from aligner.trainer.policy import Policy, Reference

    spec, mesh = read_spec(given.folder), Mesh((0,))
    config = PolicyConfig(micro_tokens=given.micro_tokens, optimizer=OptimizerConfig(lr=1e-4))
    engine = RolloutConfig(max_model_len=256, max_num_seqs=32, kv_cache_mib=given.kv_cache_mib)
    sampling = Sampling(max_tokens=RESPONSE, stop_token_ids=())
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 31000, (PROMPTS * GROUP, PROMPT + RESPONSE), generator=generator)
    prompts = [Prompt(tuple(tokens[p, :PROMPT].tolist()), "", {}, p) for p in range(PROMPTS)]
    rows = PROMPTS * GROUP
    length_B = torch.full((rows,), PROMPT + RESPONSE)
    mask_BT = (torch.arange(PROMPT + RESPONSE) >= PROMPT).expand(rows, -1).contiguous()
    fixed = Samples(
        tokens, torch.full((rows,), PROMPT), length_B, mask_BT, torch.arange(rows), [{}] * rows,
        rollout_logp_BT=torch.full(tokens.shape, -10.0),
    )  # fmt: skip

    def advantages(samples: Samples) -> torch.Tensor:
        return torch.linspace(-1, 1, samples.rows)

    def update(policy: Policy, samples: Any, **more: Any) -> None:
        policy.update(clipped_surrogate, samples, advantage_B=policy.map(advantages, samples), **more).gather()

    policy = Policy("policy", world, mesh, spec, config, syncs=WeightSyncs()) if given.case != "generate" else None
    if policy is not None and given.case == "train":
        return lambda: update(policy, policy.scatter(fixed, GROUP))
    reference = Reference("reference", world, mesh, spec, config) if policy and given.reference else None
    rollout = Rollout("rollout", world, mesh, spec, engine, sampling, 0)
    if policy is None:
        rollout.weights.pieces()
        rollout.loaded.finish()  # its placeholder weights are as large
        return lambda: rollout.generate(prompts, GROUP)

    def step() -> None:
        policy.sync(rollout)
        samples = rollout.generate(prompts, GROUP)
        more = {"reference_logp_BT": reference.logprobs(samples)} if reference else {}
        update(policy, samples, **more)
        policy.reshard_to(rollout)

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
