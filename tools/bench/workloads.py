"""Models of random weights and their data, of several sizes: what benchmarks run on, the same on every side.

Weights do not matter for the time of a step, but lengths do. Where responses have natural lengths, as many token ids end
one as make a length geometric with the wanted mean: untrained logits are all but equal, so each token is as likely.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model's sizes; tied embeddings, character tokenizer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int = 128
    llama: bool = False
    """Llama rather than Qwen3."""


SIZES = {
    "0.66M": Size(hidden=128, layers=3, heads=2, kv_heads=2, head_dim=64, ffn=384),
    "9.8M": Size(hidden=384, layers=6, heads=6, kv_heads=3, head_dim=64, ffn=1024),
    "55M": Size(hidden=768, layers=8, heads=12, kv_heads=6, head_dim=64, ffn=2208),
    "135M": Size(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, llama=True),
}
"""By their parameters; 135M has the shape of SmolLM2-135M."""
POSITIONS = 1024
CHARACTERS = "0123456789+-= abcdefghijklmnopqrstuvwxyz"


def write_model(folder: Path, size: Size, mean_length: float | None = None) -> None:
    """A checkpoint of random weights (seed 0) with its tokenizer.

    Args:
        mean_length: of a response in tokens, where nothing cuts it; None: token 2 ends one.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    ends = 1 if mean_length is None else max(1, round(size.vocab / mean_length))
    # The character tokenizer's own end token is 2; the rest are the last of the vocabulary, which no prompt has.
    eos = [2, *range(size.vocab - ends + 1, size.vocab)] if ends > 1 else 2
    config_class: Any = LlamaConfig if size.llama else Qwen3Config
    config = config_class(
        vocab_size=size.vocab, hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_dim, intermediate_size=size.ffn,
        max_position_embeddings=POSITIONS, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=eos, dtype="float32",
    )  # fmt: skip
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (LlamaForCausalLM if size.llama else Qwen3ForCausalLM)(config)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    write_tokenizer(folder, size.vocab)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """The character tokenizer of column addition, with as many entries as the model."""
    from aligner.data import column_addition

    column_addition.write_tokenizer(folder)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    entries = whole["model"]["vocab"]
    entries |= {f"<unused{i}>": i for i in range(len(entries), vocab)}
    path.write_text(json.dumps(whole))


def prompt_rows(count: int, shortest: int, longest: int) -> list[dict[str, str]]:
    """{"prompt", "answer"}: each prompt of `shortest` to `longest` tokens with <bos>, uniformly."""
    chance = random.Random(0)
    return [
        {"prompt": "<bos>" + _text(chance, chance.randint(shortest, longest) - 1), "answer": "0"} for _ in range(count)
    ]


def answered_rows(count: int, tokens: int, natural: bool, pairs: bool) -> list[dict[str, str]]:
    """{"prompt", "completion"} or {"prompt", "chosen", "rejected"}: a quarter prompt, the rest answer.

    Args:
        tokens: of every row, with <bos> and <eos>, or with `natural` of the longest: lengths are then log-normal with
            a median of a quarter of it.
        pairs: preferences rather than demonstrations.
    """
    chance = random.Random(0)
    answers = ("chosen", "rejected") if pairs else ("completion",)
    rows = []
    for _ in range(count):
        whole = round(tokens / 4 * math.exp(chance.gauss(0, 0.8))) if natural else tokens
        whole = min(tokens, max(8, whole))
        prompt = whole // 4
        row = {"prompt": "<bos>" + _text(chance, prompt - 1)}
        rows.append(row | {name: _text(chance, whole - prompt - 1) for name in answers})
    return rows


def tokens_of(row: dict[str, str]) -> int:
    """Tokens of a row of `answered_rows`: of all its answers, each with the prompt, <bos> and <eos>."""
    prompt = len(row["prompt"]) - len("<bos>") + 1
    return sum(prompt + len(row[name]) + 1 for name in ("completion", "chosen", "rejected") if name in row)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _text(chance: random.Random, characters: int) -> str:
    return "".join(chance.choice(CHARACTERS) for _ in range(characters))


def response_score(prompt: str, response: str, **fields: Any) -> float:
    """A rule that costs nothing, and differs between responses: the share of digits."""
    return sum(character.isdigit() for character in response) / max(1, len(response))
