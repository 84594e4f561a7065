"""Memory that mode=check predicts for jobs, beside what their ranks took: prints a table, and its median error.

    python tools/bench/memory.py [--jobs sft-long dpo-vocabulary ...] [--work DIR]

Each job is a small model of random weights, trained for two steps by the product's own loop; its role calls are watched in
the second (`memory_loop`). On a CPU the tensors that live are added up, so that libraries, Python and what the allocator keeps do not
count; with CUDA it is the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # also from a checkout never installed

from tools.bench.workloads import answered_rows, prompt_rows, write_rows, write_tokenizer  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 65536, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
MIB = 1 << 20


@dataclass(frozen=True)
class BenchJob:
    """One job to measure."""

    model: str
    """transformers' configuration class, without `Config`."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """What differs from SHAPE."""
    ranks: int = 1
    loop: str = "sft"
    rows: int = 2
    tokens: int = 4096
    """Of each row; of a prompt for GRPO, whose responses have 64."""
    natural: bool = False
    """Rows of many lengths, `tokens` at most."""
    settings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """data.kind."""
        return {"sft": "demonstrations", "dpo": "preferences", "grpo": "prompts"}[self.loop]

    def overrides(self, folder: Path) -> list[str]:
        """Of the product's command line."""
        longest = self.tokens + 64
        return [
            f"algorithm={self.loop}", f"data={self.kind}", f"data.path={folder}/rows.jsonl", f"model.path={folder}/model",
            f"run_dir={folder}/run", f"data.prompts_per_step={self.rows}", f"data.max_tokens={longest}",
            f"data.max_prompt_tokens={longest}", "train.steps=2", "train.save=false", "train.report=false", "checkpoint.every=0",
            "sampling.max_tokens=64", "reward.rule=tools.bench.workloads.response_score", "reward.workers=1",
            "residency.mode=off", *self.settings,
        ]  # fmt: skip

    def write(self, folder: Path) -> None:
        """The model and the rows."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.model}Config")(**{**SHAPE, **self.shape})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        write_tokenizer(folder / "model", config.vocab_size)
        settings = folder / "model" / "tokenizer_config.json"
        settings.write_text(
            json.dumps(json.loads(settings.read_text()) | {"model_max_length": config.max_position_embeddings})
        )
        rows = prompt_rows(self.rows, self.tokens, self.tokens)
        if self.loop != "grpo":
            rows = answered_rows(self.rows, self.tokens, self.natural, pairs=self.loop == "dpo")
        write_rows(folder / "rows.jsonl", rows)


LONG = ("data.train_on=all",)
JOBS: dict[str, BenchJob] = {
    "sft-long": BenchJob("Llama", rows=1, tokens=8192, settings=LONG),
    "sft-recompute": BenchJob(
        "Qwen3", {"vocab_size": 32000}, tokens=8192, settings=("policy.recompute=full", *LONG)
    ),
    "sft-windows": BenchJob(
        "Gemma3Text", {"sliding_window": 512, "tie_word_embeddings": True}, settings=("policy.micro_tokens=8192",)
    ),
    "sft-tensor": BenchJob(
        "Qwen2", ranks=2, rows=8, natural=True,
        settings=("placement.policy.tensor=2", "placement.policy.sequence_parallel=true", "policy.micro_tokens=8192"),
    ),
    "sft-pipeline": BenchJob(
        "Olmo2", ranks=2, rows=6, settings=("placement.policy.pipeline=2", "policy.micro_tokens=4096")
    ),
    "sft-context": BenchJob(
        "Llama", ranks=2, rows=1, tokens=8192, settings=("placement.policy.context=2", *LONG)
    ),
    "sft-experts": BenchJob(
        "Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384},
        settings=("policy.micro_tokens=4096",),
    ),
    "dpo-vocabulary": BenchJob(
        "Qwen2", {"vocab_size": 151936, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}, loop="dpo", rows=4, tokens=1024, natural=True,
        settings=("policy.micro_tokens=4096", "policy.dtype=bfloat16"),
    ),
    "grpo-prefix": BenchJob(
        "Qwen3", {"vocab_size": 32000}, loop="grpo", rows=2, tokens=1024,
        settings=("algorithm.group_size=4", "algorithm.roles=[policy,rollout,reward]", "rollout.kv_cache_mib=64",
                  "policy.recompute=selective"),
    ),
}  # fmt: skip
"""Families, recomputation, parallel axes, experts, long rows, vocabularies and loops, each at least once."""

SMALL = {
    "vocab_size": 32000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LONG_JOBS: dict[str, BenchJob] = {
    "sft-32k": BenchJob("Llama", SMALL, rows=1, tokens=32_768, settings=("policy.recompute=full", *LONG)),
    "sft-32k-context": BenchJob(
        "Llama", SMALL, ranks=2, rows=1, tokens=32_768,
        settings=("policy.recompute=full", "placement.policy.context=2", *LONG),
    ),
    "grpo-32k": BenchJob(
        "Qwen3", SMALL, loop="grpo", rows=1, tokens=32_704,
        settings=("algorithm.group_size=2", "algorithm.roles=[policy,rollout,reward]", "policy.recompute=full"),
    ),
}  # fmt: skip
"""Rows of 32,768 tokens; minutes each on a CPU, and only run where they are named."""


def measured(job: BenchJob, folder: Path) -> list[dict[str, dict[str, float]]]:
    """What each rank held, and took in each call."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}", "-m", "aligner.main"]
    watched = [f"algorithm._target_=tools.bench.memory_loop.{job.loop}"]
    environment = {**os.environ, "MEMORY_BENCH": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *job.overrides(folder), *watched], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{job}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(job.ranks)]


def predicted(job: BenchJob, folder: Path) -> dict[str, float]:
    """What mode=check says of its roles: bytes held, and taken by each call."""
    from aligner.check.memory import machine_of, role_bytes
    from aligner.check.microbatch import role_activations
    from aligner.config.schema import compose_config, to_config
    from aligner.run.prepare import prepare

    given = prepare(
        to_config(compose_config([*job.overrides(folder), "mode=check", f"run_dir={folder}/check"])), job.ranks
    )
    checked, config = given.checked, given.config
    cpu = machine_of(config, job.ranks).cpu
    sizes = {}
    for role, spec in checked.specs.items():
        mesh = checked.meshes[role]
        sizes[f"{role}.held"] = role_bytes(config, role, given.roles, spec, mesh, cpu)
        taken = role_activations(config, role, given.roles, checked.data, spec, mesh, cpu)
        if taken is not None:
            sizes |= {f"{role}.update": taken.update, f"{role}.logprobs": taken.inference}
    return sizes


def compare(name: str, folder: Path) -> list[float]:
    """Print the rows of one job. Returns the relative errors of its calls."""
    job = {**JOBS, **LONG_JOBS}[name]
    folder.mkdir()
    job.write(folder)
    ranks, guessed, errors = measured(job, folder), predicted(job, folder), []
    for role in dict.fromkeys(key.partition(".")[0] for rank in ranks for key in rank["held"]):
        of_ranks = [sum(size for key, size in rank["held"].items() if key.startswith(f"{role}.")) for rank in ranks]
        held, said_held = max(of_ranks), guessed[f"{role}.held"]
        for call in dict.fromkeys(key for rank in ranks for key in rank["peaks"] if key.startswith(f"{role}.")):
            took = max(rank["peaks"].get(call, 0.0) for rank in ranks)
            errors.append((guessed[call] - took) / took)
            cells = [f"{size / MIB:,.1f}" for size in (said_held, held, guessed[call], took)]
            print(f"| {name} | {call} | {' | '.join(cells)} | {errors[-1]:+.1%} |", flush=True)
    return errors


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=[*JOBS, *LONG_JOBS], default=list(JOBS))
    parser.add_argument("--work", type=Path, help="keep the jobs' files here")
    arguments = parser.parse_args()
    print("MiB of the fullest rank\n")
    print("| job | call | held, predicted | held | activations, predicted | activations | error |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    errors: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.jobs:
            errors += compare(name, work / name)
    print(
        f"\nmedian error of {len(errors)} calls: {statistics.median(map(abs, errors)):.1%}, largest {max(map(abs, errors)):.1%}"
    )


if __name__ == "__main__":
    main()
