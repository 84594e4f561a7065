"""config.json files as they were published with well-known checkpoints, written out by hand: read, or refused for a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligner.models.agreement import check_reading
from aligner.models.read_spec import read_spec

ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "initializer_range": 0.02}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "vocab_size": 32000,
    **ENDS,
}
LLAMA_3: dict[str, Any] = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
STRETCHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
    "vocab_size": 151936,
    **ENDS,
}
QWEN3: dict[str, Any] = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 2048,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "vocab_size": 256000,
    **ENDS,
}
PHI3: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "pretraining_tp"},
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "vocab_size": 32064,
}
LONG = {"long_factor": [1.25 * pair for pair in range(1, 49)], "short_factor": [1.0] * 48, "type": "longrope"}
GEMMA3: dict[str, Any] = {
    **{key: value for key, value in GEMMA.items() if key != "hidden_act"},
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vocab_size": 262144,
}
MISTRAL: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in ("pretraining_tp", "rope_scaling")},
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-1": {
        **{key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "pretraining_tp", "rope_scaling")},
        "max_position_embeddings": 2048,
        "max_sequence_length": 2048,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
    },
    "Llama-2-7b-hf": {**LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf"},
    "Llama-2-70b-hf": {**LLAMA, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "pretraining_tp": 8},
    "vicuna-7b-v1.5-16k": {**LLAMA, "max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "CodeLlama-7b": {**LLAMA, "max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016},
    "deepseek-coder-6.7b": {**LLAMA, "max_position_embeddings": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
    "Meta-Llama-3-8B": {**LLAMA_3, "max_position_embeddings": 8192},
    "Llama-3.1-8B-Instruct": {**LLAMA_3, "rope_scaling": {**STRETCHED, "factor": 8.0, "rope_type": "llama3"}},
    "Llama-3.2-1B": {
        **LLAMA_3,
        "head_dim": 64,
        "hidden_size": 2048,
        "rope_scaling": {**STRETCHED, "factor": 32.0, "rope_type": "llama3"},
        "tie_word_embeddings": True,
    },
    "Llama-3.2 through unsloth": {
        **LLAMA_3,
        "_attn_implementation_autoset": True,
        "pad_token_id": 128004,
        "rope_scaling": {**STRETCHED, "factor": 32.0, "rope_type": "llama3"},
        "unsloth_fixed": True,
        "unsloth_version": "2025.1.8",
    },
    "Llama-3.1 through transformers 5": {
        **{key: value for key, value in LLAMA_3.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")},
        "dtype": "bfloat16",
        "head_dim": 128,
        "rope_parameters": {**STRETCHED, "factor": 8.0, "rope_theta": 500000.0, "rope_type": "llama3"},
    },
    "TinyLlama-1.1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4, "torch_dtype": "float32"},
    "SmolLM2-135M": {
        **LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Yi-6B": {**LLAMA, "attention_bias": False, "num_key_value_heads": 4, "pad_token_id": 0, "rope_theta": 5000000.0},
    "DeepSeek-R1-Distill-Llama-8B": {**LLAMA_3, "rope_scaling": {**STRETCHED, "factor": 8.0, "rope_type": "llama3"}},
    "DeepSeek-R1-Distill-Qwen-1.5B": {**QWEN2, "max_position_embeddings": 131072, "sliding_window": 4096, "use_mrope": False},
    "Qwen2-1.5B": QWEN2,
    "Qwen2.5-7B-Instruct": {**QWEN2, "max_window_layers": 28, "sliding_window": 131072, "tie_word_embeddings": False},
    "Qwen2.5 through transformers 5": {
        **{key: value for key, value in QWEN2.items() if key not in ("rope_theta", "torch_dtype")},
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 28,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None,
    },
    "Qwen3-1.7B": QWEN3,
    "Qwen3 with YaRN, as its card says": {
        **QWEN3,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "Qwen2.5-7B-Instruct with YaRN, as its card says": {
        **QWEN2,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen3-30B-A3B": {
        **QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "Mixtral-8x7B-v0.1": {
        **{key: value for key, value in LLAMA.items() if key not in ("pretraining_tp", "rope_scaling")},
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "Mistral-7B-v0.1": MISTRAL,
    "Mistral-7B-Instruct-v0.3": {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "Mistral-Nemo-Base-2407": {
        **MISTRAL,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_size": 5120,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 40,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "gemma-2b": GEMMA,
    "gemma-1.1-2b-it": {**GEMMA, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    "Phi-3-mini-4k-instruct": PHI3,
    "Phi-3-mini-128k-instruct": {**PHI3, "max_position_embeddings": 131072, "rope_scaling": LONG, "sliding_window": 262144},
    "Phi-4-mini-instruct": {
        **PHI3,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONG,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "gemma-3-1b-it": GEMMA3,
    "the text of gemma-3-4b-it": {
        **GEMMA3,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 34,
        "num_key_value_heads": 4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "gemma-7b": {**GEMMA, "hidden_activation": None, "hidden_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 16},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2.5-7B-Instruct-1M": (
        {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        "dual_chunk_attention_config=.* is not supported",
    ),
    "Llama-2-7B-GPTQ": (
        {**LLAMA, "quantization_config": {"bits": 4, "quant_method": "gptq"}},
        "quantization_config=.* is not supported",
    ),
    "a Llama with code of its own": (
        {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}},
        "auto_map=.* Remove auto_map from config.json",
    ),
    "Phi-3-mini-128k-instruct of the first days": (
        {**PHI3, "max_position_embeddings": 131072, "rope_scaling": {**LONG, "type": "su"}},
        "rope_scaling: rope_type='su' is not supported; supported are 'default', 'longrope'",
    ),
    "embeddinggemma, which looks both ways": (
        {**GEMMA3, "use_bidirectional_attention": True},
        "use_bidirectional_attention=True is not supported",
    ),
    "gte-Qwen2, which looks both ways": ({**QWEN2, "is_causal": False}, "is_causal=False is not supported"),
}


def folder(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    spec = read_spec(folder(tmp_path, config))
    check_reading(spec)
    assert (spec.vocab, spec.hidden) == (config["vocab_size"], config["hidden_size"])
    assert spec.tied == config.get("tie_word_embeddings", spec.family in ("gemma", "gemma3_text"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_spec(folder(tmp_path, config))
