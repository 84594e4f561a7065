"""Small models of families that only transformers knows, with what is particular to each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    DiffLlamaConfig,
    Ernie4_5_MoeConfig,
    Exaone4Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JetMoeConfig,
    MiniCPM3Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

ENDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,  # which 2 ranks do not divide
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **ENDS,
}
WINDOW: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MLA: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 5, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0, residual_multiplier=0.3, embedding_multiplier=2.0),
    "gemma2": Gemma2Config(**SIZES, **WINDOW, head_dim=32, attn_logit_softcapping=0.5, final_logit_softcapping=2.0),
    "gpt_oss": GptOssConfig(**SIZES, **WINDOW, head_dim=32, num_local_experts=5, num_experts_per_tok=2),
    "deepseek_v2": DeepseekV2Config(**MLA, n_group=1, topk_group=1),
    "deepseek_v3": DeepseekV3Config(**{**MLA, "n_routed_experts": 6}, n_group=2, topk_group=1),
    "olmo3": Olmo3Config(**SIZES, **WINDOW),  # rotary angles that stay float32
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=64),
    "glm4": Glm4Config(**SIZES, head_dim=32),
    "smollm3": SmolLM3Config(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES, sliding_window=6),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "exaone4": Exaone4Config(**SIZES, **WINDOW),
    "cohere2": Cohere2Config(**SIZES, **WINDOW, logit_scale=0.3),
    "minicpm3": MiniCPM3Config(
        **{key: value for key, value in MLA.items() if key != "v_head_dim"}, v_head_dim=12, dim_model_base=48
    ),  # its hidden states are divided before the output layer
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **SIZES, moe_num_experts=5, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1
    ),  # parameters that it does not train, of two dimensions
    "gemma3n_text": Gemma3nTextConfig(
        **SIZES,
        **WINDOW,
        head_dim=32,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=101,
        laurel_rank=8,
        num_kv_shared_layers=1,
        activation_sparsity_pattern=[0.9, 0.0, 0.0],
        final_logit_softcapping=2.0,
    ),  # keys and values of another layer, products changed in place
    "diffllama": DiffLlamaConfig(**SIZES, head_dim=32),  # two attentions of each layer, norms without a scale
    "jetmoe": JetMoeConfig(
        **{key: value for key, value in SIZES.items() if key != "num_attention_heads"},
        kv_channels=32,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),  # experts in its attention, which nothing without memory can run
    "opt": OPTConfig(
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        ffn_dim=96,
        word_embed_proj_dim=128,
    ),  # a part inside a part
    "gpt2": GPT2Config(
        vocab_size=101, n_embd=128, n_layer=3, n_head=4, n_positions=128, eos_token_id=1, bos_token_id=1
    ),
}


def save_model(family: str, folder: Path) -> None:
    """A random model whose logits are far from uniform."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    randomize(model)
    model.save_pretrained(folder)


def randomize(model: PreTrainedModel) -> None:
    """Random weights; norms' scales stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
