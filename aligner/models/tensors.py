"""The tensors of a model's checkpoint, by Hugging Face name, and the engines' parameters made of them (no torch)."""

from __future__ import annotations

import math
import re

from aligner.models.cuts import Block, Parameter, Replicated, Vocabulary, tensor_shapes
from aligner.models.families import FAMILIES
from aligner.models.family import Family
from aligner.models.spec import SCALAR_HEAD, Head, ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"
"""An untied output layer."""
LAYER = "model.layers."
"""Prefix of the layers' tensors."""
EMBEDDING_PARAMETER = "embedding.word_embeddings.weight"
OUTPUT_PARAMETER = "output_layer.weight"
"""Names in a GPTModel of embedding and output layer, whose rows are padded."""


def family_of(spec: ModelSpec) -> Family:
    """The declaration of the model's family; only of a model without `tensors` of its own."""
    return FAMILIES[spec.family]


def architecture_of(spec: ModelSpec) -> str:
    """Name of transformers' class of the language model of this family."""
    return family_of(spec).architecture if spec.tensors is None else spec.tensors.architecture


def classifier_of(spec: ModelSpec) -> str:
    """Name of transformers' class with a scalar head in place of the output layer."""
    return re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", architecture_of(spec))


def embedding_tensor(spec: ModelSpec) -> str:
    """The checkpoint's name of the embedding."""
    return EMBEDDING if spec.tensors is None else spec.tensors.embedding


def output_tensor(spec: ModelSpec) -> str:
    """The checkpoint's name of the output layer, which it need not have."""
    return OUTPUT if spec.tensors is None else spec.tensors.output or OUTPUT


def embedding(spec: ModelSpec) -> Parameter:
    """The first stage's embedding."""
    return Parameter(EMBEDDING_PARAMETER, Vocabulary(Block(EMBEDDING, (spec.vocab, spec.hidden))))


def final_norm(spec: ModelSpec) -> Parameter:
    """The norm before the head."""
    return Parameter("decoder.final_layernorm.weight", Replicated(Block(FINAL_NORM, (spec.hidden,))))


def output_layer(spec: ModelSpec) -> Parameter:
    """The last stage's head; for a tied model a second copy of the embedding."""
    if spec.head is Head.SCALAR:
        return Parameter(OUTPUT_PARAMETER, Replicated(Block(SCALAR_HEAD, (1, spec.hidden))))
    name = EMBEDDING if spec.tied else OUTPUT
    return Parameter(OUTPUT_PARAMETER, Vocabulary(Block(name, (spec.vocab, spec.hidden))))


def new_tensors(spec: ModelSpec) -> frozenset[str]:
    """Tensors that the model's folder does not hold: a scalar head on a language model's weights.

    They start at zero, the same under every layout: the head is trained from the first step, the layers below it from the
    second.
    """
    return frozenset((SCALAR_HEAD,) if spec.head is not spec.stored_head else ())


def layer_parameters(spec: ModelSpec, layer_type: str) -> list[Parameter]:
    """Parameters of a layer of this type, except its experts', in the order of their use."""
    return family_of(spec).parameters(spec, spec.types[layer_type])


def expert_parameters(spec: ModelSpec) -> list[Parameter]:
    """Parameters of an expert, with names relative to it."""
    return family_of(spec).expert_parameters(spec)


def layer_shapes(spec: ModelSpec, layer_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer of this type, except its experts', by name relative to the layer."""
    return tensor_shapes(layer_parameters(spec, layer_type))


def expert_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of an expert's gate, up and down projection, by name relative to the expert."""
    return tensor_shapes(expert_parameters(spec))


def end_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers, by their name in the checkpoint."""
    return tensor_shapes([embedding(spec), final_norm(spec), output_layer(spec)])


def logical_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name, with its shape; a tied output layer has none."""
    if spec.tensors is not None:
        return dict(spec.tensors.shapes)
    ends = end_shapes(spec)
    shapes = {name: layer_shapes(spec, name) for name in spec.types}
    for name in (name for name, layer_type in spec.types.items() if layer_type.sparse):
        experts = expert_shapes(spec).items()
        shapes[name] |= {
            f"{expert_prefix(spec, expert)}{tensor}": shape
            for expert in range(spec.experts)
            for tensor, shape in experts
        }
    tensors = {EMBEDDING: ends.pop(EMBEDDING)}
    for number, layer_type in enumerate(spec.layer_types):
        tensors |= {layer_name(number, name): shape for name, shape in shapes[layer_type].items()}
    return tensors | ends


def parameter_count(spec: ModelSpec) -> int:
    """Number of weights; a tied output layer counts once."""
    return sum(math.prod(shape) for shape in logical_tensors(spec).values())


def layer_name(number: int, name: str) -> str:
    """The checkpoint's name of tensor `name` of layer `number` (counted over the whole model)."""
    return f"{LAYER}{number}.{name}"


def layer_number(name: str) -> int | None:
    """The layer that a tensor of the checkpoint belongs to; None outside layers."""
    number = name[len(LAYER) :].partition(".")[0]
    return int(number) if name.startswith(LAYER) and number.isdecimal() else None


def expert_prefix(spec: ModelSpec, expert: int) -> str:
    """Prefix of an expert's tensors, relative to their layer."""
    return f"{family_of(spec).named_experts.module}.experts.{expert}."


def split_expert(spec: ModelSpec, name: str) -> tuple[int, str] | None:
    """(expert, name relative to it) of a tensor named relative to its layer; None if it is not an expert's."""
    prefix = f"{family_of(spec).named_experts.module}.experts."
    expert, _, suffix = name[len(prefix) :].partition(".")
    return (int(expert), suffix) if name.startswith(prefix) and expert.isdecimal() else None


def expert_tensors(spec: ModelSpec, layer: int, expert: int) -> tuple[str, str, str]:
    """The checkpoint's names of an expert's gate, up and down projection."""
    gate, up, down = (layer_name(layer, f"{expert_prefix(spec, expert)}{name}") for name in expert_shapes(spec))
    return gate, up, down


def router_tensor(spec: ModelSpec, layer: int) -> str:
    """The checkpoint's name of a sparse layer's router."""
    return layer_name(layer, f"{family_of(spec).named_experts.module}.gate.weight")
