"""What residency costs and saves: seconds of a GRPO step and its largest memory, in each mode, cases alternating.

python tools/bench/residency.py [--size 0.6M|10M|54M|110M] [--ranks 1] [--rounds 1] [--steps 2] [--cases off auto 4.5 ...]
    [--micro-tokens 2048] [--kv-cache-mib 512] [--reference] [--json FILE]

A model of random fp32 weights, samples of 64 more tokens, on ranks of one thread each that all hold every role. Each case runs in
processes of its own that have imported both engines, `--rounds` times, the cases in turn:

  train        the policy alone: updates on a batch of the same shape
  generate     the engine alone
  off          a GRPO step of policy and engine (--reference: and a reference), nothing ever leaves
  auto         the same with residency.mode=auto and its own budget
  alternate    auto and off in the same processes, step by step: the ratio where a step is too short to compare runs
  NUMBER       the same with residency.budget_gib=NUMBER; 0: all leaves that a call does not need

The memory of `off`, `auto` and the like is printed over that of the larger role alone plus one message of the resharding (32 MiB), the
time over that of `off` in the same round. Steps before a case's last `--steps` are warm-up: three.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
COMMON = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "dtype": "float32",
    "eos_token_id": 1, "head_dim": 64,
}  # fmt: skip
WIDTHS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SIZES = {
    "0.6M": (128, 128, 384, 3, 2, 1),
    "10M": (128, 384, 1280, 5, 6, 6),
    "54M": (128, 768, 2304, 7, 12, 12),
    "110M": (32000, 768, 2048, 12, 12, 12),
}
SHAPES = {"110M": (4, 4, 64)}
"""Prompts, samples of each and tokens of a prompt; of other sizes 8, 8 and 13."""
RESPONSE, WARM_UP = 64, 3
BUCKET = 32 / 1024
"""GiB."""
Result = dict[str, float]


def main(arguments: list[str]) -> int:
    """Run every case in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="110M")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-mib", type=int, default=512)
    parser.add_argument("--reference", action="store_true", help="a reference model beside the policy")
    parser.add_argument("--cases", nargs="+", default=["train", "generate", "off", "auto", "0"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        return _child(args)
    rounds: list[dict[str, Result]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.size)
        for _ in range(args.rounds):
            rounds.append({})
            for case in args.cases:
                rounds[-1][case] = _run(case, folder, arguments, args.ranks)
                print(
                    f"{case}: {json.dumps({n: round(value, 3) for n, value in rounds[-1][case].items()})}", flush=True
                )
    report(rounds, args.cases)
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1))
    return 0


def report(rounds: list[dict[str, Result]], cases: list[str]) -> None:
    """Medians over the rounds, and the ratios."""
    middle = {case: {n: statistics.median(one[case][n] for one in rounds) for n in rounds[0][case]} for case in cases}
    names = sorted({name for row in middle.values() for name in row})
    print("            " + "".join(f"{name:>16}" for name in names))
    for case, row in middle.items():
        print(f"{case:12}" + "".join(f"{row[name]:16.3f}" if name in row else f"{'-':>16}" for name in names))
    whole = [case for case in cases if case not in ("train", "generate")]
    if {"train", "generate"} <= middle.keys():
        alone = max(middle["train"]["peak"], middle["generate"]["peak"]) + BUCKET
        for case in whole:
            print(f"{case}: {middle[case]['peak'] / alone:.3f} x (larger one alone + one bucket = {alone:.2f} GiB)")
    if "off" in cases:
        for case in whole:
            for what in ("seconds", "cpu"):
                ratios = sorted(one[case][what] / one["off"][what] for one in rounds)
                spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
                print(
                    f"{case}: {what} of a step {statistics.median(ratios):.3f} x off ({spread} in {len(rounds)} rounds)"
                )


def write_model(folder: Path, size: str) -> None:
    """A checkpoint of random weights."""
    import torch
    from safetensors.torch import save_file

    from aligner.models.read_spec import read_spec
    from aligner.models.tensors import logical_tensors

    (folder / "config.json").write_text(json.dumps({**COMMON, **dict(zip(WIDTHS, SIZES[size], strict=True))}))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in ((name, tuple(shape)) for name, shape in logical_tensors(read_spec(folder)).items())
    }
    print(f"{sum(tensor.numel() for tensor in tensors.values()) / 1e6:.1f}M parameters", flush=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _run(case: str, folder: str, arguments: list[str], ranks: int) -> Result:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    command = [*torchrun, __file__, *arguments, "--case", case, "--folder", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment)
    figures: Result = json.loads((Path(folder) / f"{case}.json").read_text())
    return figures


def _child(given: argparse.Namespace) -> int:
    """One case: {call: GiB}, "peak" over the whole life of the process, medians of a step's seconds, CPU seconds and page faults."""
    from aligner.run.library_warnings import ignore_library_notes

    ignore_library_notes()
    import vllm  # noqa: F401  (both engines are imported in every case)

    import aligner.roles.build  # noqa: F401
    from aligner.run.memory import open_account
    from aligner.spmd.messages import all_gather
    from aligner.spmd.residency_config import ResidencyConfig
    from aligner.spmd.world import World

    world = World(600)
    budget = None if given.case in ("train", "generate", "off", "auto", "alternate") else float(given.case)
    mode = "off" if given.case in ("train", "generate", "off") else "auto"
    world.residency.config = ResidencyConfig(mode=mode, budget_gib=budget)
    open_account(world, world.residency.config)
    figures = {"imported": world.residency.meter.take()["peak"]}
    step = _steps(world, given)
    figures |= {"built": world.residency.meter.take()["peak"]}
    figures |= _measured(world, step, given.steps, given.case == "alternate")
    figures["peak"] = max(figures["peak"], figures["built"])
    figures = {name: size for name, size in figures.items() if "(" not in name}
    everyone = all_gather(world, figures, range(world.size))
    if world.rank == 0:
        most = {name: max(one[name] for one in everyone) for name in figures}
        (given.folder / f"{given.case}.json").write_text(json.dumps(most))
    world.leave()


def _measured(world: Any, step: Callable[[], None], count: int, alternate: bool) -> Result:
    """Steps, the first ones warm-up; `alternate`: each is done twice then, the second time with residency off."""
    from aligner.spmd.memory_account import MemoryFigures
    from aligner.spmd.messages import all_gather

    figures: Result = {}
    taken: dict[str, list[float]] = defaultdict(list)
    config = world.residency.config
    modes = {"": config, "_off": replace(config, mode="off")} if alternate else {"": config}
    for number in range(WARM_UP + count):
        for suffix, world.residency.config in modes.items():
            if suffix and number < WARM_UP:
                continue  # what has left must come back first
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            step()
            after = resource.getrusage(resource.RUSAGE_SELF)
            taken["seconds" + suffix].append(time.perf_counter() - start)
            taken["cpu" + suffix].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            taken["faults" + suffix].append(float(after.ru_minflt - before.ru_minflt))
            for name, size in world.residency.meter.take().items():
                figures[name] = max(figures.get(name, 0.0), size)
            if world.residency.account:  # as a job does at the end of each step
                merged = MemoryFigures()
                for one in all_gather(world, world.residency.take_figures(), range(world.size)):
                    merged = merged.merged(one)
                world.residency.learn(merged)
    for what in ("seconds", "cpu") if alternate else ():
        pairs = zip(taken[what][-count:], taken[what + "_off"], strict=True)
        figures[what + "_ratio"] = statistics.median(one / off for one, off in pairs)
    return figures | {name: statistics.median(values[-count:]) for name, values in taken.items()}


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

    spec, mesh = read_spec(given.folder), Mesh(tuple(range(world.size)))
    prompt_count, group, prompt_length = SHAPES.get(given.size, (8, 8, 13))
    length = prompt_length + RESPONSE
    config = PolicyConfig(micro_tokens=given.micro_tokens, optimizer=OptimizerConfig(lr=1e-4))
    engine = RolloutConfig(max_model_len=256, max_num_seqs=64, kv_cache_mib=given.kv_cache_mib)
    sampling = Sampling(max_tokens=RESPONSE, stop_token_ids=())
    generator, rows = torch.Generator().manual_seed(1), prompt_count * group
    tokens = torch.randint(3, spec.vocab, (rows, length), generator=generator)
    prompts = [Prompt(tuple(tokens[p, :prompt_length].tolist()), "", {}, p) for p in range(prompt_count)]
    length_B = torch.full((rows,), length)
    mask_BT = (torch.arange(length) >= prompt_length).expand(rows, -1).contiguous()
    fixed = Samples(
        tokens, torch.full((rows,), prompt_length), length_B, mask_BT, torch.arange(rows), [{}] * rows,
        rollout_logp_BT=torch.full(tokens.shape, -10.0),
    )  # fmt: skip

    def advantages(samples: Samples) -> torch.Tensor:
        return torch.linspace(-1, 1, samples.rows)

    def update(policy: Policy, samples: Any, **more: Any) -> None:
        policy.update(clipped_surrogate, samples, advantage_B=policy.map(advantages, samples), **more).gather()

    policy = Policy("policy", world, mesh, spec, config, syncs=WeightSyncs()) if given.case != "generate" else None
    if policy is not None and given.case == "train":
        return lambda: update(policy, policy.scatter(fixed, group))
    reference = Reference("reference", world, mesh, spec, config) if policy and given.reference else None
    rollout = Rollout("rollout", world, mesh, spec, engine, sampling, 0)
    if policy is None:
        rollout.weights.pieces()
        rollout.loaded.finish()  # its placeholder weights are as large
        return lambda: rollout.generate(prompts, group)

    def step() -> None:
        policy.sync(rollout)
        samples = rollout.generate(prompts, group)
        more = {"reference_logp_BT": reference.logprobs(samples)} if reference else {}
        update(policy, samples, **more)
        policy.reshard_to(rollout)

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
