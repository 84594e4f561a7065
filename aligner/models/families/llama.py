"""Llama, and the many models that are of its architecture."""

from __future__ import annotations

from aligner.models.family import EngineTraits, Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    title="Llama 2, 3; SmolLM, TinyLlama",
    nullable=frozenset(("num_key_value_heads", "head_dim", "attention_dropout")),
    optional_biases=("attention_bias", "mlp_bias"),
    divided_hidden=True,
    engine=EngineTraits(output_bias=True),
)
