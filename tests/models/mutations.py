"""Mutations of config.json: every field of each family's configuration class, and fields that readers know beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.families import ROWS

ABSENT = "<absent>"
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3_moe": (Qwen3MoeConfig, EXPERTS),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "gemma": (GemmaConfig, {"head_dim": 8, "tie_word_embeddings": True}),
}
FAMILIES |= {row.config.model_type: (row.config, row.settings) for row in ROWS.values() if row.fuzz}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 50,
}
WINDOWS = ["full_attention", "sliding_attention"]
Change = dict[str, Any]
"""Field -> its new value, or ABSENT."""

ROPE: tuple[Change, ...] = (
    {"rope_scaling": YARN},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "rope_parameters": ABSENT, "rope_theta": 5e5},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_scaling": {**LLAMA3, "rope_theta": 5e5}, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_scaling": {**LLAMA3, "type": "llama3"}},
    {"rope_scaling": {**LLAMA3, "type": "linear"}},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
    {"rope_scaling": {**LLAMA3, "factor": "8"}},
    {"rope_scaling": {**LLAMA3, "factor": True}},
    {"rope_scaling": {**LLAMA3, "low_freq_factor": None}},
    {"rope_scaling": {**LLAMA3, "attention_factor": 2.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 3}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 10.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2, "max_trained_positions": 16}},
    {"rope_scaling": {"type": "dynamic"}},
    {"rope_scaling": {**YARN, "type": "yarn"}},
    {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    {"rope_scaling": {**YARN, "attention_factor": None}},
    {"rope_scaling": {**YARN, "attention_factor": 0.0}},
    {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}},
    {"rope_scaling": {**YARN, "mscale": 0.7}},
    {"rope_scaling": {**YARN, "mscale": "0.7"}},
    {"rope_scaling": {**YARN, "beta_fast": 2.0, "beta_slow": 1}},
    {"rope_scaling": {**YARN, "beta_fast": None}},
    {"rope_scaling": {**YARN, "beta_fast": 0.5}},
    {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 3}},
    {"rope_scaling": {**YARN, "truncate": None}},
    {"rope_scaling": {**YARN, "factor": None}},
    {"rope_scaling": {**YARN, "finetuned": True}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 1.5}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    {"rope_scaling": YARN, "rope_theta": 1.0},
    {"rope_scaling": YARN, "head_dim": ABSENT},
    {"rope_scaling": LONG},
    {"rope_scaling": LONG, "original_max_position_embeddings": 50},
    {"rope_scaling": LONG, "original_max_position_embeddings": 50, "partial_rotary_factor": 1.0},
    {"rope_scaling": {**LONG, "type": "su"}},
    {"rope_scaling": {**LONG, "factor": 64 / 50}},
    {"rope_scaling": {**LONG, "factor": 4.0}},
    {"rope_scaling": {**LONG, "attention_factor": 1.5}},
    {"rope_scaling": {**LONG, "short_mscale": 1.5}},
    {"rope_scaling": {**LONG, "short_factor": [1.0] * 3}},
    {"rope_scaling": {**LONG, "short_factor": "1"}},
    {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}},
    {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
    {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": {"rope_type": None, "factor": 4.0}},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "500"}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    {"rope_parameters": {"rope_theta": 500.0, "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 500.0, "rope_dim": 4}},
    {"rope_parameters": {"rope_theta": 500.0, "mrope_section": [2, 1, 1]}},
    {"rope_parameters": {"rope_theta": 500.0, "use_fope": True}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0, "rope_type": "default"}}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 100.0}}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    {"rope_parameters": {**YARN, "rope_theta": 500.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": None}},
    {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 500.0}, "sliding_attention": {"rope_theta": 100.0}}},
    {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 500.0, "truncate": False, "beta_fast": 3}}},
    {
        "rope_parameters": {
            "full_attention": {**LLAMA3, "rope_theta": 500.0},
            "sliding_attention": {**YARN, "factor": 2.0},
        }
    },
    {
        "rope_parameters": {
            "full_attention": {"rope_theta": 500.0},
            "sliding_attention": {"type": "dynamic", "factor": 2.0},
        }
    },
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0}, "chunked_attention": {"rope_theta": 100.0}}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0}, "rope_theta": 100.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}, "rope_theta": 100.0},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 100.0},
    {"rope_parameters": {"sliding_attention": {"rope_theta": 500.0}}, "rope_local_base_freq": 100.0},
    {
        "rope_parameters": ABSENT,
        "rope_theta": 500.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {"rope_parameters": ABSENT, "rope_scaling": YARN},
    {"rope_parameters": ABSENT},
    {"rope_parameters": ABSENT, "rope_theta": 500.0},
    {"rope_parameters": ABSENT, "rope_theta": None},
    {"rope_parameters": ABSENT, "rope_theta": True},
    {"rope_parameters": ABSENT, "rope_theta": 0},
    {"rope_parameters": ABSENT, "rope_theta": -500.0},
)
TOGETHER: tuple[Change, ...] = (
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    {"layer_types": WINDOWS, "sliding_window": 8},
    {"layer_types": WINDOWS, "sliding_window": 8, "use_sliding_window": True},
    {"layer_types": ABSENT, "sliding_window_pattern": 2},
    {"layer_types": ABSENT, "sliding_window_pattern": 0},
    {"layer_types": ["full_attention"] * 2, "sliding_window": 8},
    {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    {"num_key_value_heads": ABSENT, "num_attention_heads": 2},
    {"num_attention_heads": 2, "num_key_value_heads": 1},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    {"num_attention_heads": 8, "num_key_value_heads": 4},
    {"num_experts": 4, "num_local_experts": 2},
    {"num_experts": 4, "num_local_experts": 4},
    {"num_experts": ABSENT, "num_local_experts": 4},
    {"num_experts": 4, "num_local_experts": ABSENT},
    {"mlp_only_layers": [0], "decoder_sparse_step": 2},
    {"hidden_act": "gelu", "hidden_activation": None},
    {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"},
    {"attention_bias": True, "qkv_bias": False},
    {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2"},
    {"model_type": "mistral"},
    {"dtype": "bfloat16", "torch_dtype": "float32"},
    {"dtype": ABSENT, "torch_dtype": "float32"},
)
BESIDE: dict[str, tuple[Any, ...]] = {
    "architectures": (ABSENT, None, [], "LlamaForCausalLM", ["LlamaModel"], ["Custom"], ["LlamaForCausalLM", "Custom"]),
    "model_type": (ABSENT, None, "llama", "qwen2", "custom"),
    "head_dim": (4, 6, 7, 16, None, 8.0, "8", ABSENT),
    "attention_bias": (True, False, None, "true"),
    "mlp_bias": (True, False, None),
    "qkv_bias": (True, False, None),
    "bias": (True, False),
    "qk_norm": (True, False),
    "hidden_act": ("gelu", "relu", "swish", "silu", "gelu_pytorch_tanh", "gelu_new"),
    "hidden_activation": ("gelu", "relu", None, "gelu_pytorch_tanh"),
    "sliding_window": (8, 0, None, 4096),
    "use_sliding_window": (True, False, None),
    "max_window_layers": (0, 1, 99),
    "layer_types": (WINDOWS, ["full_attention"] * 2, ["full_attention"], ["attention"] * 2, "full_attention", []),
    "mlp_layer_types": (["dense", "sparse"], None),
    "attention_dropout": (0.1, 0.0, 0, None, 1),
    "hidden_dropout": (0.1, 0.0),
    "embd_pdrop": (0.1, 0.0),
    "norm_topk_prob": (True, False, None, 1),
    "num_experts_per_tok": (1, 2, 3, 4, 5),
    "decoder_sparse_step": (1, 2, 3, 0),
    "mlp_only_layers": ([], [0], [1], [0, 1], [7], ["0"], None),
    "output_router_logits": (True, False),
    "router_aux_loss_coef": (0.0, 0.02),
    "router_jitter_noise": (0.1, 0.0),
    "shared_expert_intermediate_size": (16, 0, None),
    "attention_multiplier": (0.5, 1.0, None),
    "logits_scaling": (8.0, 1.0),
    "logit_scale": (0.25, 1.0, None),
    "residual_multiplier": (0.22, 1.0),
    "embedding_multiplier": (12.0, 1.0),
    "scale_emb": (12,),
    "final_logit_softcapping": (30.0, None),
    "attn_logit_softcapping": (50.0, None),
    "query_pre_attn_scalar": (256, None),
    "clip_qkv": (8.0, None),
    "use_qk_norm": (True, False),
    "no_rope_layers": ([0, 1], None),
    "partial_rotary_factor": (0.5, 1.0, None, "1"),
    "rotary_pct": (0.25, None),
    "rotary_emb_base": (500, None),
    "rope_theta": (500.0, None),
    "rope_interleaved": (True, False),
    "rope_local_base_freq": (100.0, None),
    "sliding_window_pattern": (1, 3, 0, None, "2"),
    "original_max_position_embeddings": (16, 64, None),
    "alibi": (True, False),
    "parallel_attn": (True, False),
    "is_causal": (False, True, None, 1),
    "use_bidirectional_attention": (True, False, None),
    "is_decoder": (True, False),
    "is_encoder_decoder": (True, False),
    "add_cross_attention": (True, False),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "custom"),
    "_attn_implementation": ("eager", "sdpa"),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {}, None),
    "compression_config": ({"format": "int-quantized"}, None),
    "auto_map": (
        {"AutoModelForCausalLM": "modeling.Custom"},
        {"AutoConfig": "configuration.Custom"},
        {"AutoTokenizer": ["a.B", None]},
        {},
        None,
        "x",
    ),
    "text_config": ({"model_type": "llama"}, None, False),
    "llm_config": ({"model_type": "llama"}, None),
    "decoder": ({"model_type": "llama"}, None),
    "per_layer_config": ({"0": {"head_dim": 16}}, None),
    "dual_chunk_attention_config": ({"chunk_size": 16}, {}, None),
    "speculators_config": ({}, None),
    "fusion_config": ({"a": 1}, None),
    "configuration_files": (["config.4.0.0.json"], None),
    "transformers_weights": ("other.safetensors", None),
    "pruned_heads": ({"0": [1]}, {}, None),
    "num_nextn_predict_layers": (1, None),
    "num_kv_heads": (1, None),
    "n_head_kv": (1,),
    "max_sequence_length": (32, 64, None),
    "model_max_length": (32, 4096),
    "pretraining_tp": (1, 2, None),
    "torch_dtype": ("bfloat16", "float32", "float8", None),
    "num_labels": (1, 2, 3),
    "_name_or_path": ("x", None),
    "unsloth_version": ("2025.1",),
    "transformers.js_config": ({"dtype": "q4"},),
    "some_new_setting": (True, 1, 2.5, "x", [1], {"a": 1}, None, False),
}
ASKED = """
_attn_implementation _attn_implementation_internal _experts_implementation _experts_implementation_internal
_heterogeneity_spec _rope_type_labels assistant_confidence_threshold attention_chunk_size
attn_temperature_tuning attribute_map base_model_tp_plan block_configs canvas_length default_theta
distributed_config do_sample experts_implementation generator gradient_checkpointing gradient_clipping
head_dtype hidden_size_per_head ignore_keys_at_rope_validation is_heterogeneous is_mm_prefix_lm
logits_mup_width_multiplier max_length max_seq_len max_seq_length max_target_positions moe_num_experts moe_top_k
moe_topk mrope_section mtp_layer_types multi_query_group_num mup_width n_positions n_routed_experts name_or_path
num_attention_groups num_experts_per_token num_heads num_kv_shared_layers num_nextn_predict_layers
output_attentions projection_dim projection_size rotary_emb_fraction rswa_window seq_len seq_length sub_configs
temperature text_encoder thinker_config top_k top_k_experts torchscript use_return_dict use_unified_vision_chunk
vision_aspect_ratio vision_feature_layer vision_feature_select_strategy xdrope_section
"""
"""More names that transformers or vLLM ask a configuration for, found by noting each that it does not have."""
_OF_TYPE: dict[type, tuple[Any, ...]] = {
    bool: (True, False, None, 1, 0, "true"),
    int: (None, 0, 1, -1, True, ABSENT),
    float: (None, 0, 1, 0.0, 2.0, -1.0, "0.1", True, ABSENT, float("inf"), float("nan")),
    str: (None, "", "x", 5, ABSENT),
}


def fields_of(family: str) -> list[str]:
    """Every field of the family's configuration class."""
    return sorted(field.name for field in dataclasses.fields(FAMILIES[family][0]))


def changes(family: str, config: dict[str, Any]) -> Iterator[Change]:
    """Each once, for a model that `config` describes."""
    found: list[Change] = []
    defaults = FAMILIES[family][0]().to_dict()
    for key in fields_of(family):
        now = config.get(key, defaults.get(key))
        values = [*_OF_TYPE.get(type(now), ([], {}, "x", 3, ABSENT)), now]
        if type(now) is int:
            values += [now * 2, now // 2, now + 1, float(now), str(now)]
        if type(now) is float:
            values += [now * 2, now / 2, str(now)]
        found += [{key: value} for value in values]
    found += [{key: value} for key, values in BESIDE.items() for value in values]
    found += [{key: value} for key in ASKED.split() for value in (None, False, True, 2)]
    found += [*ROPE, *TOGETHER]
    seen: set[str] = set()
    for change in found:
        if repr(change) not in seen:
            seen.add(repr(change))
            yield change


def save(family: str, folder: Path) -> None:
    """A small model in which attention is peaked and routers tell tokens apart, so that each setting shows."""
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **more})).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(20 if key.endswith(".gate.weight") else 8 if "proj" in key else 4)
    model.save_pretrained(folder)
