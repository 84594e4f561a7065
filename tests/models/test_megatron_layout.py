"""Megatron's layout against its conventions, worked out on whole torch tensors with reshape, cat and chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aligner.models.megatron_layout import megatron_layout, padded_vocab_size, stage_layers
from aligner.models.spec import ModelSpec, read_spec
from aligner.reshard.storage import Storages
from tests.models.tiny import MODELS, save_tiny, tiny_model

SIZES = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 4)]


def layer_reference(hf: dict[str, Tensor], spec: ModelSpec, layer: int, rank: int, tensor: int) -> dict[str, Tensor]:
    """One layer's parameters on one tensor rank, by plain tensor operations."""
    at = f"model.layers.{layer}."

    def fused(suffix: str) -> Tensor:
        parts = [hf[f"{at}self_attn.{x}_proj.{suffix}"] for x in "qkv"]
        grouped = [part.reshape(spec.kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).reshape(-1, *parts[0].shape[1:]).chunk(tensor)[rank]

    found = {
        "input_layernorm.weight": hf[at + "input_layernorm.weight"],
        "self_attention.linear_qkv.weight": fused("weight"),
        "self_attention.linear_proj.weight": hf[at + "self_attn.o_proj.weight"].chunk(tensor, 1)[rank],
        "pre_mlp_layernorm.weight": hf[at + "post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat(
            [hf[f"{at}mlp.{x}_proj.weight"].chunk(tensor)[rank] for x in ("gate", "up")]
        ),
        "mlp.linear_fc2.weight": hf[at + "mlp.down_proj.weight"].chunk(tensor, 1)[rank],
    }
    if spec.family == "qwen2":
        found["self_attention.linear_qkv.bias"] = fused("bias")
    if spec.family == "qwen3":
        found |= {f"self_attention.{x}_layernorm.weight": hf[f"{at}self_attn.{x}_norm.weight"] for x in "qk"}
    return found


def reference(
    hf: dict[str, Tensor], spec: ModelSpec, rank: int, tensor: int, stage: int, pipeline: int, padded: int
) -> dict[str, Tensor]:
    """Every parameter of one rank."""

    def vocabulary(name: str) -> Tensor:
        return F.pad(hf[name], (0, 0, 0, padded - spec.vocab)).chunk(tensor)[rank]

    layers = spec.layers // pipeline
    found = {}
    if stage == 0:
        found["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight")
    for local in range(layers):
        layer = layer_reference(hf, spec, stage * layers + local, rank, tensor)
        found |= {f"decoder.layers.{local}.{name}": value for name, value in layer.items()}
    if stage == pipeline - 1:
        found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not spec.tied:
            found["output_layer.weight"] = vocabulary("lm_head.weight")
        elif pipeline > 1:
            found["output_layer.weight"] = vocabulary("model.embed_tokens.weight")
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [None, 128])
def test_every_rank_holds_what_megatron_expects(name: str, padded: int | None, tmp_path: Path) -> None:
    hf = {key: value.detach() for key, value in tiny_model(name).state_dict().items()}
    spec = read_spec(save_tiny(name, tmp_path))
    for tensor, pipeline in SIZES:
        for rank in range(tensor):
            for stage in range(pipeline):
                layers = stage_layers(spec, stage, pipeline)
                first, last = stage == 0, stage == pipeline - 1
                layout = megatron_layout(spec, rank, tensor, layers.start, len(layers), first, last, "float32", padded)
                rows = padded or padded_vocab_size(spec, tensor)
                expected = reference(hf, spec, rank, tensor, stage, pipeline, rows)
                assert {piece.storage for piece in layout} == {
                    key for key in expected if held(key, spec, rank, tensor, rows)
                }
                filled = {key: torch.zeros(value.shape) for key, value in expected.items()}
                storages = Storages(filled, layout)
                for piece in layout:
                    box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
                    storages.view(piece).copy_(hf[piece.name][box])
                assert all(torch.equal(filled[key], expected[key]) for key in expected)
                covered = sum(piece.elements for piece in layout)
                padding = padded_rows(spec, rank, tensor, rows) * spec.hidden * vocabularies(expected)
                assert covered == sum(value.numel() for value in expected.values()) - padding


def padded_rows(spec: ModelSpec, rank: int, tensor: int, rows: int) -> int:
    """Of this rank's rows of the vocabulary, those beyond its end."""
    return sum(row >= spec.vocab for row in range(rank * rows // tensor, (rank + 1) * rows // tensor))


def held(parameter: str, spec: ModelSpec, rank: int, tensor: int, rows: int) -> bool:
    """A rank whose rows are all padding has no piece of the vocabulary."""
    return not is_vocabulary(parameter) or padded_rows(spec, rank, tensor, rows) < rows // tensor


def is_vocabulary(parameter: str) -> bool:
    return parameter.startswith(("embedding", "output_layer"))


def vocabularies(parameters: dict[str, Tensor]) -> int:
    return sum(map(is_vocabulary, parameters))


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spec = read_spec(save_tiny("qwen2", tmp_path))
    with pytest.raises(ValueError, match=r"placement\.critic\.tensor=8 .* 4 key/value heads .*use 1, 2 or 4\."):
        megatron_layout(spec, 0, 8, 0, 4, True, True, "float32", setting="placement.critic")
    with pytest.raises(
        ValueError, match=r"placement\.policy\.pipeline=3 does not divide the 4 layers .*use 1, 2 or 4\."
    ):
        stage_layers(spec, 0, 3)
