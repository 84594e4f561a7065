"""Mistral: Llama's layers, and in some releases a sliding window in all of them."""

from __future__ import annotations

from aligner.models.family import Defaults, Family, Window

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    title="Mistral 7B, Mistral Nemo, Mistral Small",
    defaults=Defaults(kv_heads=8, max_positions=131072, sliding_window=4096),
    nullable=frozenset(("head_dim",)),
    window=Window.EVERY_LAYER,
)
