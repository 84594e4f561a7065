"""The Megatron policy against transformers: logits, a whole GRPO step's loss and gradients, AdamW, exported checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.conftest import Ranks
from tests.families import ROWS

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
GROWN = [1.0 + 0.25 * pair for pair in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": GROWN,
    "long_factor": [2 * one for one in GROWN],
    "original_max_position_embeddings": 32,
}
SCALED: dict[str, PreTrainedConfig] = {
    "yarn": LlamaConfig(**BASE, rope_parameters=YARN),
    "attention_factor": Qwen3Config(**BASE, head_dim=16, rope_parameters={**YARN, "attention_factor": 1.4}),
    "linear": LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "dynamic": LlamaConfig(**BASE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "longrope": LlamaConfig(**BASE, rope_parameters=LONGROPE),
    "scaled_part": Phi3Config(
        **{**BASE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32},
        rope_parameters={**LONGROPE, "short_factor": GROWN[:6], "long_factor": GROWN[:6]},
    ),
    "scaled_one_kv": LlamaConfig(**{**BASE, "num_key_value_heads": 1}, rope_parameters=YARN),
}
"""Rotary positions scaled to longer contexts."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
DENSE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "llama3": LlamaConfig(**BASE, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "qwen2": Qwen2Config(
        **BASE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False
    ),
    "qwen2_tied": Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**BASE, head_dim=48, tie_word_embeddings=True),
}
FAMILIES = DENSE | {
    "qwen3_moe": Qwen3MoeConfig(**BASE, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3_moe_raw": Qwen3MoeConfig(**BASE, **EXPERTS, norm_topk_prob=False, attention_bias=True),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4),
    "gemma": GemmaConfig(**BASE, head_dim=32, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "qwen3_biased": Qwen3Config(**BASE, attention_bias=True, head_dim=16, tie_word_embeddings=False),
    "one_kv": Qwen3Config(**{**BASE, "num_key_value_heads": 1}, head_dim=16, tie_word_embeddings=False),
    "one_kv_biased": LlamaConfig(**{**BASE, "num_key_value_heads": 1}, attention_bias=True),
    "three": LlamaConfig(**{**BASE, "num_hidden_layers": 3}),
}
FAMILIES |= {name: row.config(**{**BASE, "tie_word_embeddings": False, **row.settings}) for name, row in ROWS.items()}
LAYOUTS = {
    1: [""],
    2: ["tensor=2", "tensor=2,sp,recompute=full", "pipeline=2,recompute=full", "recompute=selective"],
    4: ["tensor=2,pipeline=2", "tensor=2,pipeline=2,sp,recompute=selective", "pipeline=2"],
}
"""Of every dense family without anything special about it."""
CASES = {
    1: ["mixtral:", "gemma:"],
    2: [
        "qwen3:adam",
        "qwen3_moe:expert=2,adam",
        "qwen3_moe_raw:expert=2,recompute=full",
        "qwen3_moe_raw:expert=2,recompute=mlp",
        "qwen3_moe_raw:expert=2,experts=grouped",
        "mixtral:pipeline=2,experts=grouped,recompute=mlp,adam",
        "llama:tensor=2,sp,recompute=mlp",
        "qwen3_moe:tensor=2,sp",
        "mixtral:expert=2,recompute=selective,micro=16",  # 4 microbatches on one shard, 3 on the other
        "mixtral:tensor=2,expert=2,sp,adam",
        "gemma:tensor=2,sp",
        "gemma:pipeline=2",
        "llama_biased:tensor=2,sp",
        "qwen3_biased:tensor=2",
        "one_kv:tensor=2",
        "yarn:tensor=2,sp",
        "three:pipeline=2,stage_layers=1+2",
        "llama:pipeline=2,virtual_pipeline=2,adam",
        "llama:context=2,adam",
        "qwen2:context=2",
        "qwen3:context=2,recompute=full",
        "qwen3_moe:context=2,expert=2,adam",
        "mixtral:context=2,recompute=selective,micro=16",
    ],
    4: [
        "qwen3:tensor=2,adam",
        "qwen3_moe:tensor=2,expert=2,sp,adam",
        "qwen3_moe:expert=2,pipeline=2,adam",
        "mixtral:expert=2,adam",
        "qwen3_moe_raw:expert=2,pipeline=2,virtual_pipeline=2",
        "one_kv:tensor=4",
        "one_kv_biased:tensor=4,sp",
        "gemma:tensor=2,pipeline=2,sp,recompute=full",
        "llama:context=2,adam",
        "qwen3:context=2,tensor=2,sp,recompute=selective,adam",
        "qwen2_tied:context=2,pipeline=2",
        "llama:context=2,pipeline=2,virtual_pipeline=2",
        "qwen3_moe:context=2,tensor=2,expert=2,sp",
        "one_kv_biased:context=2,tensor=2",
        "gemma:context=4,recompute=full",
    ],
}


CASES[1] += [f"{name}:" for name, row in ROWS.items() if row.fuzz]
CASES[2] += [f"{name}:tensor=2,sp,recompute=full" for name, row in ROWS.items() if row.fuzz]
MORE_LAYOUTS = {
    2: ["tensor=2", "pipeline=2,recompute=full", "context=2"],
    4: ["tensor=2,pipeline=2,sp", "context=2,tensor=2", "tensor=4,sp,adam"],
}
"""Of every row of `ROWS` and every kind of rotary positions."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small checkpoint of each family, with biases and norms that are not their defaults."""
    from aligner.data.column_addition import write_tokenizer

    folder = tmp_path_factory.mktemp("families")
    for name, config in (FAMILIES | SCALED).items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key or "bias" in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif "proj" in key:
                    parameter.mul_(4)  # peaked attention, so that errors of position or order show
                elif "embed_tokens" in key and config.model_type == "olmo2":
                    parameter.mul_(50)  # no norm before attention: of smaller ones a key would be its bias alone
                elif key.endswith(".gate.weight"):
                    parameter.mul_(20)  # routers that tell tokens apart
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder


SHORT_ROWS = [[1, 2, 3, 1, 2, 6], [3], [1, 2, 4], [33, 1, 7]]
"""A row of one token trains nothing; with `micro` below it, it is a microbatch of which most ranks hold nothing. (Every
batch has a row of 3: where each prediction sees one key, gradients of queries and keys are 0, and only rounding is left.)"""


def each(cases: dict[int, list[str]], default: int = 2) -> list[Any]:
    """(size of the world, case); more ranks than `default` with -m matrix."""
    return [
        pytest.param(size, case, marks=[pytest.mark.matrix] if size > default else [], id=f"{size}-{case}")
        for size, of in cases.items()
        for case in of
    ]


STEPS = {size: [f"{name}:{layout}" for name in DENSE for layout in LAYOUTS[size]] + CASES[size] for size in LAYOUTS}
NORMS = {
    2: ["qwen3_moe:tensor=2,expert=2,sp,bf16", "mixtral:tensor=2,sp,bf16", "qwen3:tensor=2,bf16"],
    4: ["mixtral:tensor=2,expert=2,sp,bf16", "qwen3_moe:expert=2,pipeline=2,bf16", "one_kv:tensor=4,bf16"],
}
SHORT = {
    2: ["llama:context=2,micro=1", "qwen3:context=2", "llama:context=2,bf16"],
    4: ["qwen2:context=4", "qwen3:context=2,tensor=2,sp,recompute=selective,micro=2", "llama:context=2"],
}


@pytest.mark.parametrize(("size", "case"), each(STEPS))
def test_a_step_equals_transformers(ranks: Ranks, checkpoints: Path, tmp_path: Path, size: int, case: str) -> None:
    ranks(size).run("tests.trainer.parity_on_ranks:check_step", checkpoints, tmp_path, case)


MORE_STEPS = {
    size: [f"{name}:{layout}" for name in (*SCALED, *ROWS) for layout in layouts]
    for size, layouts in MORE_LAYOUTS.items()
}


@pytest.mark.parametrize(("size", "case"), each(MORE_STEPS, default=0))
def test_a_step_in_more_layouts(ranks: Ranks, checkpoints: Path, tmp_path: Path, size: int, case: str) -> None:
    ranks(size).run("tests.trainer.parity_on_ranks:check_step", checkpoints, tmp_path, case)


@pytest.mark.parametrize(("size", "case"), each(NORMS))
def test_the_norm_counts_every_gradient_once(ranks: Ranks, checkpoints: Path, size: int, case: str) -> None:
    """In bf16 the optimizer has masters of its own, which must say as the parameters do whether other ranks have copies."""
    ranks(size).run("tests.trainer.parity_on_ranks:check_norm", checkpoints, case)


@pytest.mark.parametrize("lengths", SHORT_ROWS, ids=str)
@pytest.mark.parametrize(("size", "case"), each(SHORT))
def test_rows_shorter_than_there_are_ranks(
    ranks: Ranks, checkpoints: Path, size: int, case: str, lengths: list[int]
) -> None:
    ranks(size).run("tests.trainer.short_rows_on_ranks:check_short_rows", checkpoints, case, lengths)
