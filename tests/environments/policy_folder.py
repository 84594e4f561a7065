"""A small random model whose tokenizer reads any text, with a chat template of the Qwen2.5 family that takes tools."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl

from tests.data.byte_level import make_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"


def write_policy(folder: Path, positions: int, words: Sequence[str] = ()) -> None:
    """A model of 2 layers. Of an untrained model nothing that an environment understands can be expected: nine tenths of its
    tokens are one of `words`, each a token, or the end of the turn, which is as likely as all of them together."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(folder, SPECIAL, TEMPLATE.read_text(), eos="<|endoftext|>", words=words)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=None, eos_token_id=[end, tokenizer.eos_token_id],
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    if words:
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
        with torch.no_grad():
            # The first of 64 features is 8 behind the last norm, whatever the context: a head's weight on it is a bias.
            model.model.embed_tokens.weight[:, 0] = 2.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[ids, 0] = math.log(9 * len(tokenizer) / (2 * len(words))) / 8
            model.lm_head.weight[end, 0] = math.log(9 * len(tokenizer) / 2) / 8
    model.save_pretrained(folder)


def overrides(folder: Path, run_dir: Path, rows: Sequence[dict[str, Any]], *more: str) -> list[str]:
    """A short GRPO job of one rank; rewards are the environment's unless `more` says otherwise."""
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--config-name=train", f"model.path={folder}", f"data.path={data}", f"run_dir={run_dir}", "reward=environment",
        "train.steps=15", "train.eval_every=0", "train.save=false", "train.report=false", "data.prompts_per_step=2",
        "algorithm.group_size=8", "rollout.kv_cache_mib=64", "policy.optimizer.warmup_steps=0", "policy.optimizer.lr=4e-3",
        "data.max_prompt_tokens=40", "sampling.max_tokens=8", "rollout.max_model_len=2560", *more,
    ]  # fmt: skip
