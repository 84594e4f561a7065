"""What a model family declares: traits, logical tensors, and how Megatron's parameters are made of them (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """What the decoders of one architecture have in common and their config.json does not say."""

    architecture: str
    """Class name in config.json's "architectures"."""
    qkv_bias: bool
    """Query, key and value projections have a bias."""
    qk_norm: bool
    """Queries and keys are RMS-normalised per head."""
    head_dim: int | None
    """Head dimension where config.json leaves it out; None: hidden size / heads."""
    max_positions: int
    """Positions where config.json leaves them out."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False, head_dim=None, max_positions=2048),
        "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False, head_dim=None, max_positions=32768),
        "qwen3": Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True, head_dim=128, max_positions=32768),
    }
)
"""By config.json's "model_type"."""


class Kind(StrEnum):
    """How a Megatron parameter is made of logical tensors and cut over the tensor axis."""

    REPLICATED = "replicated"
    """One logical tensor, whole on every tensor rank."""
    QKV = "qkv"
    """Per key/value head: its queries' rows, its key's, its value's; heads are dealt to the tensor ranks in order."""
    GATE_UP = "gate_up"
    """A rank's rows of the gate above the same rows of the up projection."""
    COLUMNS = "columns"
    """One logical tensor, cut along its second (input) dimension."""
    VOCABULARY = "vocabulary"
    """One logical tensor, rows cut after padding their number to a multiple of the tensor ranks."""


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter and the logical tensors that it holds."""

    megatron: str
    """Name in a GPTModel of local (not TransformerEngine) layers; inside a layer for `layer_parameters`."""
    kind: Kind
    logical: tuple[str, ...]
    """Names as in the Hugging Face checkpoint; inside a layer for `layer_parameters`."""


EMBEDDING = Parameter("embedding.word_embeddings.weight", Kind.VOCABULARY, ("model.embed_tokens.weight",))
FINAL_NORM = Parameter("decoder.final_layernorm.weight", Kind.REPLICATED, ("model.norm.weight",))


def output_layer(spec: ModelSpec) -> Parameter:
    """The output layer of a last stage that has its own; a tied one is a second copy of the embedding."""
    return Parameter("output_layer.weight", Kind.VOCABULARY, EMBEDDING.logical if spec.tied else ("lm_head.weight",))


def layer_parameters(spec: ModelSpec) -> list[Parameter]:
    """A layer's parameters, in the order in which Megatron's layer uses them."""
    qkv = ("self_attn.q_proj.{0}", "self_attn.k_proj.{0}", "self_attn.v_proj.{0}")
    found = [
        Parameter("input_layernorm.weight", Kind.REPLICATED, ("input_layernorm.weight",)),
        Parameter("self_attention.linear_qkv.weight", Kind.QKV, tuple(name.format("weight") for name in qkv)),
    ]
    if spec.qkv_bias:
        found.append(Parameter("self_attention.linear_qkv.bias", Kind.QKV, tuple(name.format("bias") for name in qkv)))
    if spec.qk_norm:
        found.append(Parameter("self_attention.q_layernorm.weight", Kind.REPLICATED, ("self_attn.q_norm.weight",)))
        found.append(Parameter("self_attention.k_layernorm.weight", Kind.REPLICATED, ("self_attn.k_norm.weight",)))
    return [
        *found,
        Parameter("self_attention.linear_proj.weight", Kind.COLUMNS, ("self_attn.o_proj.weight",)),
        Parameter("pre_mlp_layernorm.weight", Kind.REPLICATED, ("post_attention_layernorm.weight",)),
        Parameter("mlp.linear_fc1.weight", Kind.GATE_UP, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        Parameter("mlp.linear_fc2.weight", Kind.COLUMNS, ("mlp.down_proj.weight",)),
    ]


def logical_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name, with its shape; a tied output layer is not one."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (spec.hidden,),
        "self_attn.q_proj.weight": (queries, spec.hidden),
        "self_attn.k_proj.weight": (keys, spec.hidden),
        "self_attn.v_proj.weight": (keys, spec.hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.q_norm.weight": (spec.head_dim,),
        "self_attn.k_norm.weight": (spec.head_dim,),
        "self_attn.o_proj.weight": (spec.hidden, queries),
        "post_attention_layernorm.weight": (spec.hidden,),
        "mlp.gate_proj.weight": (spec.ffn, spec.hidden),
        "mlp.up_proj.weight": (spec.ffn, spec.hidden),
        "mlp.down_proj.weight": (spec.hidden, spec.ffn),
    }
    names = [name for parameter in layer_parameters(spec) for name in parameter.logical]
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING.logical[0]: (spec.vocab, spec.hidden)}
    for number in range(spec.layers):
        tensors |= {layer_name(number, name): layer[name] for name in names}
    tensors[FINAL_NORM.logical[0]] = (spec.hidden,)
    if not spec.tied:
        tensors[output_layer(spec).logical[0]] = (spec.vocab, spec.hidden)
    return tensors


def layer_name(number: int, name: str) -> str:
    """The checkpoint's name of tensor `name` of layer `number` (counted over the whole model)."""
    return f"model.layers.{number}.{name}"
