"""OLMo 2: norms after attention and MLP alone, queries and keys normalised over all heads together."""

from __future__ import annotations

from aligner.models.family import Defaults, EngineTraits, Family, Norms
from aligner.models.spec import QKNorm

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    title="OLMo 2 1B, 7B, 13B, 32B",
    defaults=Defaults(norm_eps=1e-5),
    nullable=frozenset(("num_key_value_heads",)),
    optional_biases=("attention_bias",),
    norms=Norms(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    ),
    qk_norm=QKNorm.PROJECTION,
    engine=EngineTraits(
        output_bias=True,
        shared_kv_heads=False,
        note="vLLM's transformers backend, which fails with more tensor ranks than key/value heads: `Cannot gather norm of width 64: "
        "a TP-sharded input of width 32 does not tile it evenly across 4 ranks`",
    ),
)
