"""Qwen3 with experts, in all layers or in some."""

from __future__ import annotations

from aligner.models.family import Defaults, EngineTraits, Experts, Family, Window
from aligner.models.spec import QKNorm

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    title="Qwen3-30B-A3B, Qwen3-235B-A22B",
    defaults=Defaults(kv_heads=4, max_positions=32768),
    optional_biases=("attention_bias",),
    window=Window.SWITCHED,
    qk_norm=QKNorm.HEAD,
    experts=Experts(
        count=("num_experts", "num_local_experts"),
        width="moe_intermediate_size",
        module="mlp",
        projections=("gate_proj", "up_proj", "down_proj"),
        some_dense=True,
    ),
    engine=EngineTraits(ends_everywhere=True),
)
