"""Megatron's layout against its conventions, worked out on whole torch tensors with reshape, cat and chunk."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.tensors import expert_tensors, logical_tensors, router_tensor
from aligner.reshard.local import TensorWeights
from aligner.reshard.plan.region import Piece
from aligner.spmd.mesh import EXPERT_AXES, Mesh
from aligner.trainer.megatron.layout import STACKED, MegatronLayout
from tests.models.tiny import MODELS, save_tiny, stored_tensors

MESHES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tensor": 2}),
    (8, {"tensor": 8}),  # beyond the 4 key/value heads
    (4, {"pipeline": 4}),
    (8, {"tensor": 4, "pipeline": 2}),
    (8, {"tensor": 2, "pipeline": 2}),
    (2, {"pipeline": 2, "stage_layers": (1, 3)}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
]
EXPERT_MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"expert": 2}),
    (4, {"tensor": 2, "expert": 4}),
    (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    (8, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
]


def chunks(mesh: Mesh, layers: int, stage: int) -> list[range]:
    """By hand: layers dealt in the model's order to chunk 0 of every stage, then chunk 1."""
    counts = mesh.stage_layers or [layers // (mesh.pipeline * mesh.virtual_pipeline)] * (
        mesh.pipeline * mesh.virtual_pipeline
    )
    starts = [sum(counts[:block]) for block in range(len(counts))]
    blocks = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return [blocks[chunk * mesh.pipeline + stage] for chunk in range(mesh.virtual_pipeline)]


def unfused(hf: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """With Phi-3's fused projections one by one, as in other checkpoints."""
    single = dict(hf)
    for name, value in hf.items():
        at = name.rpartition(".self_attn.")[0] or name.rpartition(".mlp.")[0]
        if ".qkv_proj." in name:
            queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
            for part, rows in zip("qkv", value.split([queries, keys, keys]), strict=True):
                single[f"{at}.self_attn.{part}_proj.weight"] = rows
        elif ".gate_up_proj." in name:
            for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                single[f"{at}.mlp.{part}_proj.weight"] = rows
    return single


class Reference:
    """Every parameter of one rank, by plain tensor operations on the checkpoint's tensors."""

    def __init__(self, hf: dict[str, Tensor], spec: ModelSpec, mesh: Mesh, rank: int) -> None:
        self.hf, self.spec, self.mesh = unfused(hf, spec), spec, mesh
        self.at = {**mesh.coordinates(rank), **mesh.coordinates(rank, EXPERT_AXES)}

    def parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        stage, many = self.at["pipeline"], self.mesh.virtual_pipeline > 1
        for chunk, layers in enumerate(chunks(self.mesh, self.spec.layers, stage)):
            prefix = f"chunk{chunk}." if many else ""
            if stage == 0 and chunk == 0:
                found[f"{prefix}embedding.word_embeddings.weight"] = self.vocabulary("model.embed_tokens.weight")
            for local, number in enumerate(layers):
                at = f"{prefix}decoder.layers.{local}."
                found |= {f"{at}{name}": value for name, value in self.layer(number).items()}
            if stage == self.mesh.pipeline - 1 and chunk == self.mesh.virtual_pipeline - 1:
                found[f"{prefix}decoder.final_layernorm.weight"] = self.hf["model.norm.weight"]
                if not self.spec.tied:
                    found[f"{prefix}output_layer.weight"] = self.vocabulary("lm_head.weight")
                elif self.mesh.pipeline > 1:
                    found[f"{prefix}output_layer.weight"] = self.vocabulary("model.embed_tokens.weight")
        return found

    def vocabulary(self, name: str) -> Tensor:
        padding = -self.spec.vocab % self.mesh.tensor
        return F.pad(self.hf[name], (0, 0, 0, padding)).chunk(self.mesh.tensor)[self.at["tensor"]]

    def fused(self, at: str, suffix: str) -> Tensor:
        parts = [self.hf[f"{at}self_attn.{x}_proj.{suffix}"] for x in "qkv"]
        grouped = [part.reshape(self.spec.kv_heads, -1, *part.shape[1:]) for part in parts]
        whole = torch.cat(grouped, 1).reshape(-1, *parts[0].shape[1:])
        return whole.chunk(self.mesh.tensor)[self.at["tensor"]]

    def mlp(self, gate: Tensor, up: Tensor, tensor: int, place: int) -> Tensor:
        return torch.cat([part.chunk(tensor)[place] for part in (gate, up)])

    def layer(self, number: int) -> dict[str, Tensor]:
        spec, at, tensor, place = self.spec, f"model.layers.{number}.", self.mesh.tensor, self.at["tensor"]
        hf = self.hf
        found = {
            "self_attention.linear_qkv.weight": self.fused(at, "weight"),
            "self_attention.linear_proj.weight": hf[at + "self_attn.o_proj.weight"].chunk(tensor, 1)[place],
        }
        after = at + "post_feedforward_layernorm.weight" in hf  # then "post attention" is meant
        norms = {
            "input_layernorm": "input_layernorm",
            "post_attention_norm" if after else "pre_mlp_layernorm": "post_attention_layernorm",
            **(
                {"pre_mlp_layernorm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
                if after
                else {}
            ),
        }
        for mine, theirs in norms.items():
            if f"{at}{theirs}.weight" in hf:
                found[f"{mine}.weight"] = hf[f"{at}{theirs}.weight"]
        if at + "self_attn.q_proj.bias" in hf:
            found["self_attention.linear_qkv.bias"] = self.fused(at, "bias")
        if at + "self_attn.o_proj.bias" in hf:
            found["self_attention.linear_proj.bias"] = hf[at + "self_attn.o_proj.bias"]
        if at + "self_attn.q_norm.weight" in hf:
            found |= {f"self_attention.{x}_layernorm.weight": hf[f"{at}self_attn.{x}_norm.weight"] for x in "qk"}
        if number in spec.sparse_layers:
            return found | self.experts(number)
        for part in ("weight", "bias"):
            if f"{at}mlp.gate_proj.{part}" in hf:
                gate, up, down = (hf[f"{at}mlp.{x}_proj.{part}"] for x in ("gate", "up", "down"))
                found[f"mlp.linear_fc1.{part}"] = self.mlp(gate, up, tensor, place)
                found[f"mlp.linear_fc2.{part}"] = down if part == "bias" else down.chunk(tensor, 1)[place]
        return found

    def experts(self, number: int) -> dict[str, Tensor]:
        held = self.spec.experts // self.mesh.expert
        found = {"mlp.router.weight": self.hf[router_tensor(self.spec, number)]}
        tensor, place = self.mesh.expert_tensor, self.at["expert_tensor"]
        for slot in range(held):
            names = expert_tensors(self.spec, number, self.at["expert"] * held + slot)
            gate, up, down = (self.hf[name] for name in names)
            found[f"mlp.experts.local_experts.{slot}.linear_fc1.weight"] = self.mlp(gate, up, tensor, place)
            found[f"mlp.experts.local_experts.{slot}.linear_fc2.weight"] = down.chunk(tensor, 1)[place]
        return found


def stacked(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts' weights of each layer as `GroupedExperts` has them."""
    grouped = {name: value for name, value in parameters.items() if ".local_experts." not in name}
    for name in (name for name in parameters if ".local_experts.0." in name):
        before, after = name.split("local_experts.0.")
        slots = sum(one.startswith(f"{before}local_experts.") and one.endswith(after) for one in parameters)
        experts = [parameters[f"{before}local_experts.{slot}.{after}"] for slot in range(slots)]
        grouped[f"{before}{STACKED[after]}"] = torch.stack(experts)
    return grouped


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_holds_what_megatron_expects(name: str, grouped: bool, tmp_path: Path) -> None:
    spec = read_spec(save_tiny(name, tmp_path))
    if grouped and not spec.experts:
        pytest.skip("no experts")
    hf = stored_tensors(tmp_path)
    for size, sizes in MESHES + (EXPERT_MESHES if spec.experts else []):
        mesh = Mesh(tuple(range(3, 3 + 2 * size, 2)), **sizes)
        side = MegatronLayout(spec, mesh, "float32", grouped)
        held: dict[str, dict[Piece, list[int]]] = {}
        for rank in mesh.ranks:
            expected = Reference(hf, spec, mesh, rank).parameters()
            expected = stacked(expected) if grouped else expected
            layout = side.layout(rank)
            filled = {key: torch.zeros(value.shape) for key, value in expected.items()}
            storages = TensorWeights(filled, layout)
            for piece in layout:
                box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
                storages.view(piece).copy_(hf[piece.name][box])
                held.setdefault(piece.name, {}).setdefault(piece, []).append(rank)
            assert all(torch.equal(filled[key], expected[key]) for key in expected), (sizes, rank)
            covered = sum(piece.elements for piece in layout)
            assert covered == sum(value.numel() for value in expected.values()) - padding(spec, expected, mesh, rank)
        assert held.keys() == hf.keys()
        for tensor, pieces in held.items():
            found = dict(side.holders(tensor))
            assert len(found) == len(side.holders(tensor))
            assert found == {piece: tuple(ranks) for piece, ranks in pieces.items()}


def padding(spec: ModelSpec, expected: dict[str, Tensor], mesh: Mesh, rank: int) -> int:
    """Elements of this rank's rows of the vocabulary beyond its end."""
    rows = -(-spec.vocab // mesh.tensor)
    first = mesh.coordinates(rank)["tensor"] * rows
    beyond = sum(row >= spec.vocab for row in range(first, first + rows))
    return beyond * spec.hidden * sum("embedding" in key or "output_layer" in key for key in expected)


def test_who_is_not_asked_for(tmp_path: Path) -> None:
    side = MegatronLayout(read_spec(save_tiny("qwen3-moe", tmp_path)), Mesh((2, 3), expert=2), "bfloat16")
    assert side.ranks == (2, 3)
    assert side.layout(0) == []
    for name in ("lm_head.bias", "model.layers.4.input_layernorm.weight", "model.layers.x.y", "model.layers.0.mlp.x"):
        assert side.holders(name) == []
    for name in ("0.mlp.experts.4.up_proj.weight", "2.mlp.experts.0.up_proj.weight", "0.mlp.experts.0.up_proj.bias"):
        assert side.holders(f"model.layers.{name}") == []  # layer 2 is dense, and has no fourth expert either
    assert [ranks for _, ranks in side.holders("model.layers.0.mlp.experts.3.up_proj.weight")] == [(3,)]
    assert [ranks for _, ranks in side.holders("model.layers.2.mlp.up_proj.weight")] == [(2, 3)]


def test_a_world_of_1024_ranks_is_cheap(tmp_path: Path) -> None:
    """36,945 tensors, the size of a 235B mixture of experts; a hundredfold margin over what a slow core needs."""
    spec = replace(
        read_spec(save_tiny("qwen3-moe", tmp_path)),
        layers=94,
        layer_types=("sparse",) * 94,
        experts=128,
        expert_ffn=1536,
        hidden=4096,
        heads=64,
        kv_heads=4,
        head_dim=128,
        ffn=12288,
        vocab=151936,
    )
    names = list(logical_tensors(spec))
    start = time.perf_counter()
    side = MegatronLayout(spec, Mesh(tuple(range(1024)), tensor=4, pipeline=2, expert=32), "bfloat16")
    held = {name: side.holders(name) for name in names}
    layout = side.layout(1023)
    assert time.perf_counter() - start < 60
    assert all(held.values())
    # by hand: of 512 ranks of a stage, 16 share each of 32 expert shards; 25 pieces in a layer, 12 of them experts'
    assert {len(ranks) for _, ranks in held["model.layers.50.mlp.experts.77.up_proj.weight"]} == {16}
    assert len(layout) == 47 * 25 + 2
