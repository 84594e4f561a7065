"""Small random models of the families of docs/families.md, as transformers' configurations make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB = 128
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""Of every model; vLLM's CPU attention wants heads of 32 at least."""


@dataclass(frozen=True)
class FamilyModel:
    """One small model."""

    title: str
    """The family's usual name."""
    config: str
    """transformers' configuration class."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration, beside or instead of SIZES."""


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,  # with the 64 of positions the one size that vLLM's CPU kernel has
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "head_dim": 64,
}
WINDOWED = ["sliding_attention", "full_attention"]
MODELS: Mapping[str, FamilyModel] = {
    "llama": FamilyModel("Llama 2, 3", "LlamaConfig"),
    "qwen2": FamilyModel("Qwen2, Qwen2.5", "Qwen2Config"),
    "qwen3": FamilyModel("Qwen3", "Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": FamilyModel(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        {"head_dim": 32, "moe_intermediate_size": 64, "norm_topk_prob": True, "mlp_only_layers": [0], **_EXPERTS},
    ),
    "qwen2_moe": FamilyModel(
        "Qwen2-MoE (a shared expert)",
        "Qwen2MoeConfig",
        {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, **_EXPERTS},
    ),
    "mistral": FamilyModel("Mistral", "MistralConfig", {"sliding_window": 8, "head_dim": 32}),
    "mixtral": FamilyModel(
        "Mixtral", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    ),
    "gemma": FamilyModel("Gemma", "GemmaConfig", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": FamilyModel(
        "Gemma 2",
        "Gemma2Config",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "layer_types": WINDOWED,
        },
    ),
    "gemma3_text": FamilyModel(
        "Gemma 3 (text)",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "layer_types": WINDOWED,
        },
    ),
    "phi3": FamilyModel("Phi-3, Phi-4", "Phi3Config", {"sliding_window": 8}),
    "olmo2": FamilyModel("OLMo 2", "Olmo2Config"),
    "olmoe": FamilyModel("OLMoE", "OlmoeConfig", {"intermediate_size": 64, **_EXPERTS}),
    "glm4": FamilyModel("GLM-4-0414", "Glm4Config", {"head_dim": 32}),
    "granite": FamilyModel(
        "Granite 3",
        "GraniteConfig",
        {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.15},
    ),
    "smollm3": FamilyModel("SmolLM3", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "starcoder2": FamilyModel("StarCoder2", "Starcoder2Config", {"sliding_window": None}),
    "gpt_neox": FamilyModel("GPT-NeoX, Pythia", "GPTNeoXConfig", {"rotary_pct": 0.25, "num_key_value_heads": 4}),
    "exaone4": FamilyModel(
        "EXAONE 4",
        "Exaone4Config",
        {"sliding_window": 8, "sliding_window_pattern": 2, "layer_types": WINDOWED, "head_dim": 32},
    ),
    "cohere2": FamilyModel(
        "Cohere 2 (Command R7B)",
        "Cohere2Config",
        {"sliding_window": 48, "tie_word_embeddings": True, "layer_types": WINDOWED, "head_dim": 32},
    ),
    "gpt_oss": FamilyModel(
        "gpt-oss",
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "head_dim": 32,
            "layer_types": WINDOWED,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3_next": FamilyModel(
        "Qwen3-Next (gated delta net)",
        "Qwen3NextConfig",
        {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            **_EXPERTS,
        },
    ),
    "deepseek_v2": FamilyModel(
        "DeepSeek-V2", "DeepseekV2Config", {**_MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    ),
    "deepseek_v3": FamilyModel(
        "DeepSeek-V3, R1",
        "DeepseekV3Config",
        {
            **_MLA,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_mtp_layers": 0,
        },
    ),
}
"""By model_type."""


def write_model(name: str, folder: Path, seed: int = 0) -> Any:
    """Write a small random model to `folder`, and return it: float32, in eval mode, eager where its attention soft-caps."""
    import torch
    import transformers as hf

    made = MODELS[name]
    hf.utils.logging.disable_progress_bar()
    config = getattr(hf, made.config)(**{**SIZES, **made.settings})
    torch.manual_seed(seed)
    soft_caps = getattr(config, "attn_logit_softcapping", None) is not None  # torch's own kernels leave it out
    more = {"attn_implementation": "eager"} if soft_caps else {}
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **more).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def randomize(model: Any) -> None:
    """Weights from torch's random state, large enough that every layer shows in the output."""
    import torch

    tied, gemma = model.config.tie_word_embeddings, model.config.model_type.startswith("gemma")
    outer = (
        0.02 if gemma else 0.1 if tied else 0.3
    )  # tied, the input token would always win; Gemma scales its embeddings
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor_name not in model.state_dict():
                continue
            noise = torch.randn_like(tensor)
            if "norm" in tensor_name and tensor_name.endswith("weight"):
                tensor.copy_((0 if gemma else 1) + 0.2 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise * (outer if "embed" in tensor_name or "lm_head" in tensor_name else 0.1))
