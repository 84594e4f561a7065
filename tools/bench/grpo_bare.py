"""GRPO without a framework: bare vLLM, a bare training step of transformers and torch, a raw copy of the weights.

grpo.py starts this, once for each process; arguments: a JSON file as `grpo.Bench` writes it, and which process it is. The
processes share prompts and gradients, as the product's ranks do. Nothing is scored: advantages are random. The copy is of
all weights into storage of the engine's type that nothing reads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(TRANSFORMERS_VERBOSITY="error", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind")

import torch
from bare_training import BareTraining, Batch, Row, join
from torch import Tensor


def main(spec: dict[str, Any], rank: int) -> None:
    """Run the steps; the first process writes what they took."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = spec["processes"]
    group = join(spec["port"], rank, ranks)
    engine = make_engine(spec)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    training = BareTraining(model, group, ranks, spec["lr"], spec["dtype"] == "bfloat16")
    copies = [torch.empty_like(weight, dtype=getattr(torch, spec["rollout_dtype"])) for weight in training.weights]
    texts = [json.loads(line)["prompt"] for line in Path(spec["rows"]).read_text().splitlines()]
    prompts = AutoTokenizer.from_pretrained(spec["model"])(texts, add_special_tokens=False).input_ids
    steps = []
    for step in range(spec["warmup"] + spec["steps"]):
        share = prompts[step * spec["prompts"] + rank : (step + 1) * spec["prompts"] : ranks]
        marks = [time.perf_counter()]
        drawn = generate(engine, share, spec)
        group.barrier().wait()
        marks.append(time.perf_counter())
        training.update([[row] for row in drawn], lambda batch: policy_loss(batch, model))
        marks.append(time.perf_counter())
        with torch.no_grad():
            torch._foreach_copy_(copies, training.weights)
        group.barrier().wait()
        marks.append(time.perf_counter())
        spans = [after - before for before, after in pairwise(marks)]
        tokens = torch.tensor([sum(len(row) - start for row, start in drawn)])
        group.allreduce([tokens]).wait()
        steps.append(
            dict(zip(("generate", "update", "sync"), spans, strict=True))
            | {"other": 0.0, "step": sum(spans), "tokens": tokens.item()}
            | {"length": tokens.item() / (spec["prompts"] * spec["group"])}
        )
    if rank == 0:
        Path(spec["out"]).write_text(json.dumps({"steps": steps[spec["warmup"] :]}))
    group.barrier().wait()


def make_engine(spec: dict[str, Any]) -> Any:
    """vLLM as it comes, on this process alone."""
    from vllm import LLM

    return LLM(
        model=spec["model"],
        dtype=spec["rollout_dtype"],
        max_model_len=spec["max_model_len"],
        max_num_seqs=spec["prompts"] * spec["group"],
        enforce_eager=spec["eager"],
        kv_cache_memory_bytes=spec["kv_cache_mib"] << 20,
        disable_log_stats=True,
        seed=0,
    )


def generate(engine: Any, prompts: list[list[int]], spec: dict[str, Any]) -> list[Row]:
    """`group` samples of each prompt."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        n=spec["group"],
        temperature=1.0,
        max_tokens=spec["max_tokens"],
        ignore_eos=spec["fixed"],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    outputs = engine.generate([tokens_input(prompt) for prompt in prompts], params, use_tqdm=False)
    return [
        ([*prompt, *one.token_ids], len(prompt))
        for prompt, output in zip(prompts, outputs, strict=True)
        for one in output.outputs
    ]


def policy_loss(batch: Batch, model: Any) -> Tensor:
    """The clipped surrogate at a ratio of 1: its mean over a row's tokens, summed over rows."""
    logp_BT = batch.logp(model)
    ratio_BT = (logp_BT - logp_BT.detach()).exp()
    advantage_B1 = torch.randn(len(logp_BT), 1)
    surrogate_BT = torch.minimum(ratio_BT * advantage_B1, ratio_BT.clamp(0.8, 1.28) * advantage_B1)
    return -((surrogate_BT * batch.mask_BT).sum(1) / batch.mask_BT.sum(1)).sum()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
