"""SFT, DPO and reward modelling without a framework: transformers, torch, gloo.

train.py starts this, once for each process; arguments: a JSON file as `train.Bench` writes it, and which process it is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(TRANSFORMERS_VERBOSITY="error")

import torch
from bare_training import BareTraining, Batch, Row, join
from torch import Tensor
from torch.nn.functional import logsigmoid


def main(spec: dict[str, Any], rank: int) -> None:
    """Run the steps; the first process writes what they took."""
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks, method = spec["processes"], spec["method"]
    group = join(spec["port"], rank, ranks)
    if method == "reward_model":
        kind, more = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        kind, more = transformers.AutoModelForCausalLM, {}
    model = kind.from_pretrained(spec["model"], dtype=torch.float32, **more)
    training = BareTraining(model, group, ranks, spec["lr"], spec["dtype"] == "bfloat16")
    loss: Callable[[Batch], Tensor] = {"sft": sft, "reward_model": bradley_terry}.get(method, sft)(model)
    if method == "dpo":
        reference = kind.from_pretrained(spec["model"], dtype=torch.float32).requires_grad_(False)
        loss = dpo(model, reference)
    groups = encoded(spec)
    steps = []
    for step in range(spec["warmup"] + spec["steps"]):
        group.barrier().wait()
        begin = time.perf_counter()
        training.update(groups[step * spec["batch"] + rank : (step + 1) * spec["batch"] : ranks], loss)
        steps.append({"step": time.perf_counter() - begin})
    if rank == 0:
        Path(spec["out"]).write_text(json.dumps({"steps": steps[spec["warmup"] :]}))
    group.barrier().wait()


def encoded(spec: dict[str, Any]) -> list[list[Row]]:
    """The rows of the file as token ids: a demonstration by itself, a pair as chosen and rejected."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]

    def encode(prompt: str, answer: str) -> Row:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        return [*ids, *tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id], len(ids)

    names = [name for name in ("completion", "chosen", "rejected") if name in rows[0]]
    return [[encode(row["prompt"], row[name]) for name in names] for row in rows]


def sft(model: Any) -> Callable[[Batch], Tensor]:
    """Each row's mean negative log-likelihood."""
    return lambda batch: -((batch.logp(model) * batch.mask_BT).sum(1) / batch.mask_BT.sum(1)).sum()


def dpo(model: Any, reference: Any) -> Callable[[Batch], Tensor]:
    """-log sigmoid of the difference of the two rewards, of each pair."""

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            reference_B = (batch.logp(reference) * batch.mask_BT).sum(1)
        reward_B = 0.1 * ((batch.logp(model) * batch.mask_BT).sum(1) - reference_B)
        return -logsigmoid(reward_B[::2] - reward_B[1::2]).sum()

    return loss


def bradley_terry(model: Any) -> Callable[[Batch], Tensor]:
    """-log sigmoid of the difference of the two scores, of each pair."""

    def loss(batch: Batch) -> Tensor:
        score_B = model(batch.ids_BT, attention_mask=batch.attended_BT, use_cache=False).logits[:, 0].float()
        return -logsigmoid(score_B[::2] - score_B[1::2]).sum()

    return loss


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
