"""Prefix sharing: seconds and peak memory of log-probabilities and update, with and without, by group size and prompt length.

python tools/bench/prefix.py [--hidden 384] [--layers 6] [--rows 32] [--groups 1 2 4 8 16] [--prompts 16 64 256 1024]

A batch is as many rows, whatever the group size; each row is its group's prompt and a response of its own. Rounds of the two
settings alternate; a number is the fastest of them (on a CPU in seconds of processor time, which other processes disturb less;
set OMP_NUM_THREADS=1). Peak memory is of activations, above weights, gradients and optimizer
state. One line of JSON for each case; the last lines are a table.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also from a checkout never installed

import torch

from aligner.data.column_addition import ModelShape, write_model
from aligner.data.samples import Samples, pad_rows
from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.world import World
from aligner.trainer.config import OptimizerConfig, PolicyConfig
from aligner.trainer.policy import Policy
from tools.bench.live_tensors import peak_bytes

SETTINGS = ("off", "on")
Measures = dict[str, dict[str, float]]
"""By value of `share_prefix`: seconds of logprobs and update, MiB of each."""


def batch(rows: int, group: int, prompt: int, responses: list[int], vocab: int, seed: int) -> Samples:
    """Rows of `prompt` tokens and a response of as many as `responses` says, which is trained."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=generator).tolist()

    prompts = [tokens(prompt) for _ in range(-(-rows // group))]
    tokens_BT = pad_rows([prompts[row // group] + tokens(responses[row]) for row in range(rows)], torch.long)
    length_B, place_T = prompt + torch.tensor(responses), torch.arange(prompt + max(responses))
    mask_BT = (place_T >= prompt) & (length_B[:, None] > place_T)
    return Samples(tokens_BT, torch.full((rows,), prompt), length_B, mask_BT, torch.arange(rows), [{}] * rows)


def likelihood(policy_logp_BT: torch.Tensor, *, mask_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """A loss that costs nothing."""
    return -torch.where(mask_BT, policy_logp_BT, 0.0), {}


def now(device: torch.device) -> float:
    """Seconds, once all work so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(policies: dict[str, Policy], ref: Ref, rounds: int) -> Measures:
    """The fastest of `rounds` calls of each policy, alternating, and the peak of a further one."""
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        share: {"logprobs": lambda p=policy: p.logprobs(ref), "update": lambda p=policy: p.update(likelihood, ref)}  # type: ignore[misc]
        for share, policy in policies.items()
    }
    best: Measures = {share: {} for share in policies}
    for _ in range(rounds):
        for share, of_policy in calls.items():
            for name, call in of_policy.items():
                start = now(policies[share].world.device)
                call()
                seconds = now(policies[share].world.device) - start
                best[share][f"{name}_s"] = min(best[share].get(f"{name}_s", seconds), seconds)
    for share, of_policy in calls.items():
        for name, call in of_policy.items():
            best[share][f"{name}_mib"] = peak_bytes(call, torch.device(policies[share].world.device)) / 2**20
    return best


def measure_all(arguments: argparse.Namespace) -> None:
    """Run the only rank of the job."""
    world = World(600)
    spec = read_spec(arguments.folder)
    policies = {
        share: Policy(
            share,
            world,
            Mesh((0,), name="policy"),
            spec,
            PolicyConfig(micro_tokens=arguments.micro_tokens, share_prefix=share, optimizer=OptimizerConfig(lr=0.0)),
        )
        for share in SETTINGS
    }
    lines = []
    for prompt in arguments.prompts:
        for group in arguments.groups:
            draw = random.Random(0)
            most = arguments.response
            responses = [draw.randint(1, 2 * most) if arguments.ragged else most for _ in range(arguments.rows)]
            samples = batch(arguments.rows, group, prompt, responses, spec.vocab, prompt)
            by_share = measure(policies, policies["off"].scatter(samples, group), arguments.rounds)
            print(json.dumps({"prompt": prompt, "group": group, **by_share}), flush=True)
            lines.append(line(prompt, group, by_share))
    print("| prompt | group | log-probabilities | update | peak of the update |\n| --- | --- | --- | --- | --- |")
    print("\n".join(lines), flush=True)
    world.leave()


def line(prompt: int, group: int, by_share: Measures) -> str:
    """A row of the table: without -> with, and the ratio."""
    cells = [str(prompt), str(group)]
    for name, unit in (("logprobs_s", "s"), ("update_s", "s"), ("update_mib", "MiB")):
        off, on = (by_share[share][name] for share in SETTINGS)
        digits = 0 if unit == "MiB" else 2
        cells.append(f"{off:.{digits}f} -> {on:.{digits}f} {unit} ({off / on:.2f}x)")
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--response", type=int, default=64, help="tokens of each response")
    parser.add_argument("--ragged", action="store_true", help="responses of 1 to twice as many tokens")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given to the rank
    arguments = parser.parse_args()
    if arguments.folder:
        measure_all(arguments)
        return 0
    heads = max(1, arguments.hidden // 64)
    shape = ModelShape(
        hidden=arguments.hidden, layers=arguments.layers, heads=heads, kv_heads=max(1, heads // 2),
        head_dim=arguments.hidden // heads, ffn=3 * arguments.hidden,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, seed=0)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        return subprocess.run([sys.executable, *launch, __file__, *sys.argv[1:], "--folder", folder]).returncode


if __name__ == "__main__":
    sys.exit(main())
