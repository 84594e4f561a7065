"""FP8 weights in vLLM's own FP8 layers, put there by its own loaders' rules; only the product of matrices is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aligner.models.checkpoint import read_weights
from aligner.models.read_spec import read_spec
from aligner.reshard.message.quantize import quantize_blocks
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.engines import backend
from aligner.rollout.quantization import SETTING, quantized_tensors, weight_bytes
from aligner.rollout.requests import Sample
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.mesh import Mesh
from tests.rollout import tiny
from tests.rollout.vllm.fp8_stand_in import fp8_on_a_cpu, spread

CONFIG = replace(tiny.CONFIG, dtype="bfloat16", quantization="fp8")
# 128 rows of keys and of values: two heads of 64 make a block.
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def qwen2(**sizes: int) -> Any:
    """A random model whose projections are made of whole blocks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **{**SIZES, **sizes})).bfloat16()


def qwen3_tied() -> Any:
    """With norms of queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(6)
    return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, head_dim=64, **SIZES)).bfloat16()


def qwen3_moe() -> Any:
    """A dense layer, and one of four experts, whose router stays in bfloat16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(7)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [0]}
    made: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(tie_word_embeddings=False, head_dim=64, **more, **SIZES))
    return made.bfloat16()


@pytest.fixture(params=[qwen2, qwen3_tied, qwen3_moe], ids=["qwen2", "qwen3_tied", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    made = request.param()
    tiny.save(made, tmp_path)
    return made, tmp_path


@pytest.fixture
def engine(model: tuple[Any, Path], group: dist.ProcessGroup) -> Iterator[VllmEngine]:
    with fp8_on_a_cpu():
        made = VllmEngine(model[1], group, "test", CONFIG, torch.device("cpu"))
        yield made
        made.close()


def test_a_folder_in_an_fp8_engine(engine: VllmEngine, model: tuple[Any, Path]) -> None:
    """vLLM's layers hold the reference's bits; what they compute is what transformers does with the same rounded weights."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

    spec, weights = read_spec(model[1]), EngineWeights(engine)
    quantized = quantized_tensors(spec, CONFIG)
    reference = tiny.tensors(model[0])
    projections = {name for name in reference if name.endswith("_proj.weight")}
    assert set(quantized) == projections and len(projections) == (2 * 4 + 3 + 4 * 3 if spec.experts else 2 * 7)
    layout = backend("vllm").layout(spec, Mesh((0,), 1, 1), CONFIG)
    assert set(weights.pieces()) == set(layout.layout(0)), (
        "vLLM's loaders put each block and scale where arithmetic says"
    )
    read_weights(spec, weights, quantized, SETTING)
    padding = (128 - tiny.VOCAB) * spec.hidden * 2 * (1 if spec.tied else 2)  # of the vocabulary
    assert weights.bytes() - padding == weight_bytes(spec, CONFIG)

    attention: Any = engine.model.get_submodule("model.layers.1.self_attn.qkv_proj")
    assert isinstance(attention.quant_method, Fp8LinearMethod)
    parts = [quantize_blocks(reference[f"model.layers.1.self_attn.{part}_proj.weight"]) for part in "qkv"]
    held, scales = attention.weight.view(torch.uint8), attention.weight_scale_inv
    assert torch.equal(held, torch.cat([fp8.view(torch.uint8) for fp8, _ in parts]))
    assert torch.equal(scales, torch.cat([scales for _, scales in parts]))

    sampling = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=())
    [answer] = engine.finish(engine.resume([Sample([5, 6, 7, 8, 9], seed=3)], sampling))
    drawn, rounded, whole = (
        torch.tensor(answer.logp),
        logp(rounded_model(model[0], quantized, model[1] / "rounded"), answer),
        logp(model[0].float(), answer),
    )
    assert (drawn - rounded).abs().mean() < 0.5 * (drawn - whole).abs().mean(), "it computes with the rounded weights"
    assert (drawn - rounded).abs().max() < 0.02  # bfloat16 activations


def rounded_model(model: Any, quantized: Mapping[str, Any], folder: Path) -> Any:
    """The model with FP8 weights times their scales, in float32."""
    from safetensors.torch import save_file

    tiny.save(deepcopy(model).float(), folder)
    values = {name: value.float().contiguous() for name, value in tiny.tensors(model).items()}
    for name in quantized:
        fp8, scales = quantize_blocks(values[name])
        values[name] = fp8.float() * spread(scales)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return type(model).from_pretrained(folder)


def logp(model: Any, answer: Sample) -> Tensor:
    """log p of each drawn token, by transformers."""
    tokens = torch.tensor([*answer.prompt, *answer.tokens])
    with torch.no_grad():
        logp_TV = model(tokens[None]).logits[0].float().log_softmax(-1)
    return logp_TV[:-1].gather(1, tokens[1:, None])[len(answer.prompt) - 1 :, 0]


REFUSED: dict[str, tuple[dict[str, Any], bool, dict[str, int], str]] = {
    "CPU": ({}, True, {}, "is for GPUs"),
    "float32": ({"dtype": "float32"}, False, {}, "use rollout.dtype=bfloat16 or float16"),
    "half a block of key rows": ({}, False, {"num_key_value_heads": 1}, r"k_proj.weight\[0:64, 0:256\] of 64x256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, cpu, sizes, message = REFUSED[case]
    tiny.save(qwen2(**sizes), tmp_path)
    with pytest.raises(ValueError, match=rf"rollout\.quantization=fp8.*{message}"):
        backend("vllm").check(read_spec(tmp_path), Mesh((0,), 1, 1), replace(CONFIG, **settings), cpu)


def test_another_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantization=fp8: engine=transformers .*; use rollout\.engine=vllm"):
        replace(RolloutConfig(), engine="transformers", quantization="fp8").check()
