"""Mixtral: every MLP is a router over experts."""

from __future__ import annotations

from aligner.models.family import Defaults, EngineTraits, Experts, Family

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    title="Mixtral 8x7B, 8x22B",
    defaults=Defaults(kv_heads=8, max_positions=131072, norm_eps=1e-5, rope_theta=1e6),
    nullable=frozenset(("head_dim",)),
    keeps_null_head_dim=True,
    only={"router_jitter_noise": (0.0,)},
    experts=Experts(
        count=("num_local_experts", "num_experts"),
        width="intermediate_size",
        module="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        norm_topk=True,
    ),
    engine=EngineTraits(ends_everywhere=True),
)
