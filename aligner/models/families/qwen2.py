"""Qwen2 and Qwen2.5: biases on query, key and value."""

from __future__ import annotations

from aligner.models.family import Defaults, EngineTraits, Family, Window

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    title="Qwen2, Qwen2.5",
    defaults=Defaults(kv_heads=32, max_positions=32768),
    nullable=frozenset(("num_key_value_heads",)),
    qkv_bias=True,
    window=Window.SWITCHED,
    engine=EngineTraits(fixed_head_dim=True),
)
