"""TRL's own GRPOTrainer on the work of grpo.py, which starts this: seconds of each step by phase.

In: a JSON file, as `grpo.peer_spec` makes it. Out: a JSON file beside it. Under torchrun with several ranks TRL shares the
batch among them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(TRANSFORMERS_VERBOSITY="error", VLLM_LOGGING_LEVEL="ERROR", TRL_EXPERIMENTAL_SILENCE="1")
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


def main(spec: dict[str, Any]) -> None:
    """Train, and write what the steps took."""
    import datasets
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer
    from workloads import response_score

    datasets.disable_progress_bars()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    lengths: list[int] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [response_score("", text) for text in completions]

    vllm = spec["mode"] == "vllm"
    if vllm:
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ |= {name: os.environ.get(name, value) for name, value in SINGLE.items()}
        unpacked_weights()
    clock = step_clock(timed_methods(GRPOTrainer), lengths)
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"]),
        args=arguments(spec),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[clock],
    )
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(spec["out"]).write_text(json.dumps({"steps": clock.steps[spec["warmup"] :]}))


SINGLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What vLLM's external launcher reads."""


def arguments(spec: dict[str, Any]) -> Any:
    """The work's settings as TRL's arguments: on the CPU, without saving, one microbatch a step."""
    from trl import GRPOConfig

    fixed = {"vllm": {"ignore_eos": True}}.get(spec["mode"], {"min_new_tokens": spec["max_tokens"]})
    return GRPOConfig(
        output_dir=spec["folder"],
        max_steps=spec["warmup"] + spec["steps"],
        per_device_train_batch_size=spec["prompts"] * spec["group"] // RANKS,
        num_generations=spec["group"],
        max_completion_length=spec["max_tokens"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        generation_kwargs=fixed if spec["fixed"] else None,
        use_vllm=spec["mode"] == "vllm",
        vllm_mode="colocate",
        vllm_max_model_length=spec["max_model_len"],
        vllm_gpu_memory_utilization=0.3,
        bf16=spec["autocast"],
        gradient_checkpointing=False,
        use_cpu=True,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def timed_methods(trainer: Any) -> dict[str, float]:
    """Seconds since the last step by name, filled while the trainer works."""
    from trl.extras.profiling import ProfilingContext

    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, key: str) -> None:
        method = getattr(trainer, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                seconds[key] += time.perf_counter() - begin

        setattr(trainer, name, call)

    timed("_generate_single_turn", "generate")
    timed("_generate_and_score_completions", "rollout")

    def note(self: Any, duration: float) -> None:
        if self.name.endswith("sync_weights"):
            seconds["sync"] += duration

    ProfilingContext._log_metrics = note
    return seconds


def step_clock(seconds: dict[str, float], lengths: list[int]) -> Any:
    """A callback that keeps each step's phases: generate, update, sync, other (scoring, log-probabilities), step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            whole, rollout = now - self.begin, seconds["rollout"]
            generate, sync = seconds["generate"] - seconds["sync"], seconds["sync"]
            self.steps.append(
                {
                    "generate": generate,
                    "update": whole - rollout,
                    "sync": sync,
                    "other": rollout - generate - sync,
                    "step": whole,
                    "tokens": sum(lengths) * RANKS,
                    "length": sum(lengths) / len(lengths),
                }
            )
            seconds.clear()
            lengths.clear()
            self.begin = now

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

    return Clock()


def unpacked_weights() -> None:
    """Keep vLLM's CPU build from packing its weights: TRL's weight sync writes them by name, and fails on packed ones."""
    import torch
    import vllm.model_executor.layers.linear  # noqa: F401

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, layer.weight, bias)

    for name, module in list(sys.modules.items()):  # some import it by name
        if name.startswith("vllm.") and "dispatch_cpu_unquantized_gemm" in vars(module):
            module.dispatch_cpu_unquantized_gemm = plain


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
