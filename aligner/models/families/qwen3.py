"""Qwen3: queries and keys are normalised, head by head."""

from __future__ import annotations

from aligner.models.family import Defaults, Family, Window
from aligner.models.spec import QKNorm

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    title="Qwen3",
    defaults=Defaults(kv_heads=32, head_dim=128, max_positions=32768),
    nullable=frozenset(("num_key_value_heads",)),
    optional_biases=("attention_bias",),
    window=Window.SWITCHED,
    qk_norm=QKNorm.HEAD,
)
