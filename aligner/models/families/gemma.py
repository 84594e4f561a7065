"""Gemma (the first): norms times 1 + weight, scaled embeddings, a GELU gate."""

from __future__ import annotations

from aligner.models.family import Defaults, EngineTraits, Family

FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    title="Gemma 2B, 7B",
    defaults=Defaults(kv_heads=16, head_dim=256, max_positions=8192, tied=True),
    optional_biases=("attention_bias",),
    norm_plus_one=True,
    activations=("gelu_pytorch_tanh", "gelu"),  # transformers takes Gemma's old "gelu" for the tanh form too
    scaled_embedding=True,
    engine=EngineTraits(ends_everywhere=True),
)
