"""TRL's own SFTTrainer, DPOTrainer and RewardTrainer on the work of train.py, which starts this: seconds of each step.

In: a JSON file as `train.Bench` writes it. Out: a JSON file beside it. Under torchrun TRL shares the batch among the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(TRANSFORMERS_VERBOSITY="error", TRL_EXPERIMENTAL_SILENCE="1")
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
COLUMNS = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}
COLUMNS["reward_model"] = COLUMNS["dpo"]


def main(spec: dict[str, Any]) -> None:
    """Train, and write what the steps took."""
    import datasets
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    datasets.disable_progress_bars()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    clock = Clock()
    trainer_class, model, arguments = parts(spec)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{name: row[name] for name in COLUMNS[spec["method"]]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[clock],
    )
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        steps = [{"step": after - before} for before, after in pairwise(clock.ends)]
        Path(spec["out"]).write_text(json.dumps({"steps": steps[spec["warmup"] :]}))


def parts(spec: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The trainer's class, the model, its arguments: on the CPU, without saving, one microbatch a step."""
    import torch
    import transformers
    import trl

    shared = dict(
        output_dir=spec["folder"],
        max_steps=spec["warmup"] + spec["steps"],
        per_device_train_batch_size=spec["batch"] // RANKS,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_length=spec["max_tokens"],
        train_sampling_strategy="sequential",
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    if spec["method"] == "reward_model":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            spec["model"], num_labels=1, dtype=torch.float32
        )
        model.config.pad_token_id = 0
        return trl.RewardTrainer, model, trl.RewardConfig(**shared)
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    if spec["method"] == "sft":
        return trl.SFTTrainer, model, trl.SFTConfig(**shared, completion_only_loss=True)
    return trl.DPOTrainer, model, trl.DPOConfig(**shared, beta=0.1)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
