"""TRL's own SFTTrainer and DPOTrainer on the rows and settings of trl_curves.py, which starts this.

In: a JSON file {"out": path, "runs": [...]}, a run as `trl_curves.peer_run` makes it. Out: {run: what its steps logged
and which rows they were given}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

# Before TRL and what it stands on are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

COLUMNS = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}


def main(spec: dict[str, Any]) -> None:
    """Every run in turn: a later one may start from what an earlier one saved."""
    import datasets
    import torch

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    curves = {run["name"]: train(run) for run in spec["runs"]}
    Path(spec["out"]).write_text(json.dumps(curves))


def train(run: dict[str, Any]) -> dict[str, Any]:
    """One training run: {"loss", "grad_norm", "lr"}: one number per step; "rows": each step's token ids and masks."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    lines = Path(run["rows"]).read_text().splitlines()
    rows = [{name: row[name] for name in COLUMNS[run["method"]]} for row in map(json.loads, lines)]
    trainer = recording_trainer(run["method"], run["recipe"]["warmup_steps"])(
        model=run["model"],
        args=arguments(run),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(run["model"]),
    )
    trainer.train()
    if run["save"]:
        trainer.save_model(run["save"])
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logged) == run["steps"], f"{len(logged)} steps are logged, not {run['steps']}"
    per_step = len(trainer.batches) // run["steps"]
    return {
        "loss": [row["loss"] for row in logged],
        "grad_norm": [row["grad_norm"] for row in logged],
        "lr": [row["learning_rate"] for row in logged],
        "rows": [[*chain(*trainer.batches[i : i + per_step])] for i in range(0, len(trainer.batches), per_step)],
        "decayed": decayed(trainer),
    }


def arguments(run: dict[str, Any]) -> Any:
    """The run's settings as TRL's arguments: one CPU process, no saving, no mixed precision."""
    from trl import DPOConfig, SFTConfig

    recipe = run["recipe"]
    own: dict[str, Any] = {"completion_only_loss": True} if run["method"] == "sft" else {"beta": recipe["beta"]}
    return {"sft": SFTConfig, "dpo": DPOConfig}[run["method"]](
        output_dir=run["folder"],
        max_steps=run["steps"],
        per_device_train_batch_size=recipe["batch"] // run["accumulation"],
        gradient_accumulation_steps=run["accumulation"],
        learning_rate=recipe["lr"],
        lr_scheduler_type=recipe["schedule"],
        warmup_steps=recipe["warmup_steps"],
        optim="adamw_torch",
        adam_beta1=recipe["beta1"],
        adam_beta2=recipe["beta2"],
        adam_epsilon=recipe["eps"],
        weight_decay=recipe["weight_decay"],
        max_grad_norm=recipe["clip_grad"],
        max_length=recipe["max_tokens"],
        model_init_kwargs={"dtype": "float32"},
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **own,
    )


def recording_trainer(method: str, warmup_steps: int) -> Any:
    """TRL's trainer, which also keeps the rows of each step; its first warm-up step is lr / warmup_steps, not 0."""
    import torch
    from transformers import get_scheduler
    from trl import DPOTrainer, SFTTrainer

    base: Any = {"sft": SFTTrainer, "dpo": DPOTrainer}[method]

    class Recording(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.batches: list[list[Any]] = []
            super().__init__(*args, **kwargs)

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append(list(rows_of(inputs)))
            return super().training_step(model, inputs, *args, **kwargs)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            # transformers' own, whose warm-up is step / warmup_steps: it begins with a step that moves nothing.
            theirs = get_scheduler(self.args.lr_scheduler_type, nothing, warmup_steps, num_training_steps)
            rate = partial(warmed_up, theirs.lr_lambdas[0], warmup_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
            return self.lr_scheduler

    return Recording


def warmed_up(rate: Any, warmup_steps: int, step: int) -> float:
    """`rate` from the end of the warm-up on; until then (step + 1) / warmup_steps."""
    return float(rate(step)) if step >= warmup_steps else (step + 1) / warmup_steps


def rows_of(inputs: dict[str, Any]) -> Iterator[list[list[int]]]:
    """[token ids, 0 or 1: trained] of each row without its padding; of pairs the chosen and the rejected in turn."""
    trained = inputs["labels"].ne(-100) if "labels" in inputs else inputs["completion_mask"].bool()
    order = list(range(len(trained)))
    if "labels" not in inputs:
        half = len(order) // 2
        order = [side for pair in zip(order[:half], order[half:], strict=True) for side in pair]
    for row in order:
        there = inputs["attention_mask"][row].bool()
        yield [inputs["input_ids"][row][there].tolist(), trained[row][there].int().tolist()]


def decayed(trainer: Any) -> dict[str, int]:
    """How many parameters of one dimension and of more have weight decay in the optimizer, and how many have none."""
    counts = {"one_dim": 0, "more_dims": 0, "one_dim_not": 0, "more_dims_not": 0}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            kind = "one_dim" if parameter.dim() == 1 else "more_dims"
            counts[kind if group["weight_decay"] else f"{kind}_not"] += 1
    return counts


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
