"""A small model of any family of transformers: the sizes of its configuration by the names that families give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.trainer.fsdp.families import FAMILIES, randomize

SIZES: dict[str, Any] = {
    "vocab_size": 101, "vocab_size_per_layer_input": 101, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "hidden_size_per_layer_input": 8,
    "intermediate_size": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers_per_stack": 2,
    "encoder_layers": 2, "decoder_layers": 4, "num_kv_shared_layers": 0, "num_dense_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 2, "swa_num_attention_heads": 4, "head_dim": 16,
    "global_head_dim": 16, "rotary_dim": 8, "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 6,
    "num_experts": 5, "num_local_experts": 5, "n_routed_experts": 6, "moe_num_experts": 5, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48, "moe_num_shared_experts": 1,
    "zero_expert_num": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "laurel_rank": 8,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "H_cycles": 1, "L_cycles": 1, "kv_channels": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 5,
    "llama_4_scaling_beta": 0.5,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral3": {"rope_parameters": YARN},  # attention scores by position
    "mixtral": {"sliding_window": None},
    "zaya": {"num_experts_per_tok": 1},
    "youtu": {"pad_token_id": None},  # transformers' loader would set its row to zero
}
NOT_MADE = (
    "bamba",
    "cohere_compass_text",
    "falcon_h1",
    "lfm2_moe",
    "qwen4_exp_text",
    "reformer",
    "xlnet",
    "zamba",
    "zamba2",
)
"""Their configurations are not of these sizes alone."""


def model_types() -> list[str]:
    """Every family with a language model of one decoder whose configuration has no parts."""
    parts = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if CONFIG_MAPPING[name].sub_configs]
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}.difference(parts, NOT_MADE))


def small_config(model_type: str) -> PreTrainedConfig:
    """A configuration of four layers, one at least of each type."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    kind = CONFIG_MAPPING[model_type]
    usual: Any = kind()
    named = {*usual.to_dict(), *usual.attribute_map}
    fields = {name: size for name, size in SIZES.items() if name in named}
    if "qk_rope_head_dim" in fields:  # of latent attention
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields.pop("head_dim", None)
    if usual.to_dict().get("layer_types"):
        fields["layer_types"] = (list(dict.fromkeys(usual.layer_types)) * 4)[:4]
    if usual.to_dict().get("mlp_layer_types"):
        fields["mlp_layer_types"] = ["dense", "sparse", "sparse", "sparse"]
    made: PreTrainedConfig = kind(**{**fields, **OWN.get(model_type, {})})
    return made


def save_small(model_type: str, folder: Path) -> None:
    """A random model of the family."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(small_config(model_type))
    randomize(model)
    model.save_pretrained(folder)
