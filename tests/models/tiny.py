"""Tiny checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 67,  # odd, so that tensor ranks pad it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = ("llama", "llama-rope", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied")


def tiny_model(name: str) -> PreTrainedModel:
    """Every parameter random, norms and biases too, so that none can be mistaken for another."""
    tied = name.endswith("-tied")
    torch.manual_seed(len(name))
    if name.startswith("llama"):
        rope = {"rope_parameters": LLAMA3_ROPE} if name == "llama-rope" else {}
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, **rope))
    elif name.startswith("qwen2"):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.float()


def save_tiny(name: str, folder: Path, **arguments: Any) -> Path:
    tiny_model(name).save_pretrained(folder, **arguments)
    return folder
