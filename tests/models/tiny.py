"""Tiny checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.families import ROWS

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
QWEN3_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [2],
    "norm_topk_prob": True,
}
KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 8}),
    "qwen3-moe": (Qwen3MoeConfig, {"head_dim": 8, "attention_bias": True, **QWEN3_MOE}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 3}),
    "gemma-tied": (GemmaConfig, {"head_dim": 8}),
}
KINDS |= {name: (row.config, row.settings) for name, row in ROWS.items()}
MODELS = tuple(KINDS)


def tiny_model(name: str) -> PreTrainedModel:
    """Every parameter random, norms and biases too, so that none can be mistaken for another."""
    kind, settings = KINDS[name]
    torch.manual_seed(len(name))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        kind(**{**SIZES, "tie_word_embeddings": name.endswith("-tied"), **settings})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.float()


def save_tiny(name: str, folder: Path, **arguments: Any) -> Path:
    tiny_model(name).save_pretrained(folder, **arguments)
    return folder


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: transformers fuses experts in memory, not in its files."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def save_small_weights(folder: Path, names: Sequence[str]) -> Path:
    """`folder` with a model of each name, of which two training engines agree to rounding: small weights, norms of about 1."""
    for name in names:
        model = tiny_model(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.mul_(0.1).add_(float("norm" in key))
        model.save_pretrained(folder / name)
    return folder
