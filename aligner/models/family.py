"""What a model family declares: traits, logical tensors, and how Megatron's parameters are made of them (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec


@dataclass(frozen=True)
class ExpertNames:
    """How a family names its experts: keys of config.json, and tensors inside a layer of the checkpoint."""

    count: tuple[str, ...]
    """Keys of the number of experts (releases of transformers differ); where both are there they must agree."""
    width: str
    """Key of the width of one expert."""
    module: str
    """The sparse MLP inside its layer; its router is `<module>.gate.weight`."""
    projections: tuple[str, str, str]
    """Gate, up and down projection inside `<module>.experts.<number>`."""


@dataclass(frozen=True)
class Family:
    """What the decoders of one architecture have in common and their config.json does not say."""

    architecture: str
    """Class name in config.json's "architectures"."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias whatever config.json says."""
    optional_biases: tuple[str, ...] = ()
    """Of "attention_bias" (query, key, value, output) and "mlp_bias" (gate, up, down), those that config.json may set."""
    qk_norm: bool = False
    """Queries and keys are RMS-normalised per head."""
    activations: tuple[str, ...] = ("silu",)
    """Names in config.json of the activation of the gate; all of one family mean the same function."""
    norm_plus_one: bool = False
    """RMSNorm multiplies by 1 + weight."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings of this family alone that would change the computation, with the values that are implemented."""
    experts: ExpertNames | None = None
    """None: every MLP is dense."""
    norm_topk: bool | None = None
    """Whether the chosen experts' probabilities are divided by their sum; None: config.json's norm_topk_prob says."""
    some_dense: bool = False
    """Of a family with experts: decoder_sparse_step and mlp_only_layers say which layers have them."""
    window_switch: bool = False
    """use_sliding_window says whether there is a sliding window."""
    kv_heads: int | None = None
    """What transformers takes where config.json leaves out num_key_value_heads; None: as many as query heads."""
    null_kv_heads: bool = False
    """num_key_value_heads may be null: as many as query heads."""
    null_head_dim: bool = False
    """head_dim may be null: hidden size / heads."""
    keeps_null_head_dim: bool = False
    """transformers leaves a null head_dim as it is, which its "dynamic", "yarn" and "longrope" rotary positions cannot read."""
    null_dropout: bool = False
    """attention_dropout may be null: none."""
    fixed_head_dim: bool = False
    """The engine takes hidden size / heads, whatever head_dim says."""
    divided_hidden: bool = False
    """transformers wants a hidden size that the heads divide, even where head_dim is another."""
    head_dim: int | None = None
    """Head dimension where config.json leaves it out; None: hidden size / heads."""
    max_positions: int = 2048
    """Positions where config.json leaves them out."""
    norm_eps: float = 1e-6
    """rms_norm_eps where config.json leaves it out."""
    rope_theta: float = 10000.0
    """rope_theta where config.json leaves it out."""
    tied: bool = False
    """tie_word_embeddings where config.json leaves it out."""

    @property
    def classifier(self) -> str:
        """The architecture with a scalar head in place of the output layer."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")


_COUNTS = ("num_experts", "num_local_experts")
_QWEN3_EXPERTS = ExpertNames(_COUNTS, "moe_intermediate_size", "mlp", ("gate_proj", "up_proj", "down_proj"))
_MIXTRAL_EXPERTS = ExpertNames(_COUNTS[::-1], "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2"))
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            "LlamaForCausalLM",
            optional_biases=("attention_bias", "mlp_bias"),
            null_kv_heads=True,
            null_head_dim=True,
            null_dropout=True,
            divided_hidden=True,
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM",
            qkv_bias=True,
            window_switch=True,
            kv_heads=32,
            null_kv_heads=True,
            fixed_head_dim=True,
            max_positions=32768,
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            qk_norm=True,
            optional_biases=("attention_bias",),
            window_switch=True,
            kv_heads=32,
            null_kv_heads=True,
            head_dim=128,
            max_positions=32768,
        ),
        "qwen3_moe": Family(
            "Qwen3MoeForCausalLM",
            qk_norm=True,
            optional_biases=("attention_bias",),
            experts=_QWEN3_EXPERTS,
            some_dense=True,
            window_switch=True,
            kv_heads=4,
            max_positions=32768,
        ),
        "mixtral": Family(
            "MixtralForCausalLM",
            only={"router_jitter_noise": (0.0,)},
            experts=_MIXTRAL_EXPERTS,
            norm_topk=True,
            kv_heads=8,
            null_head_dim=True,
            keeps_null_head_dim=True,
            max_positions=131072,
            norm_eps=1e-5,
            rope_theta=1e6,
        ),
        "gemma": Family(
            "GemmaForCausalLM",
            optional_biases=("attention_bias",),
            activations=("gelu_pytorch_tanh", "gelu"),  # transformers takes Gemma's old "gelu" for the tanh form too
            norm_plus_one=True,
            scaled_embedding=True,
            kv_heads=16,
            head_dim=256,
            max_positions=8192,
            tied=True,
        ),
    }
)
"""By config.json's "model_type"."""


class Head(StrEnum):
    """What a model makes of the last hidden states."""

    LANGUAGE = "language"
    """Logits over the vocabulary: an output layer of its own, or the embedding again."""
    SCALAR = "scalar"
    """One number a token: the tensor `score.weight` [1, hidden], no bias."""


class Kind(StrEnum):
    """How a Megatron parameter is made of logical tensors and cut over the tensor axis."""

    REPLICATED = "replicated"
    """One logical tensor, whole on every tensor rank."""
    QKV = "qkv"
    """Per key/value head: its queries' rows, its key's, its value's; these rows are cut evenly, heads or not."""
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
SCALAR_HEAD = "score.weight"
"""The checkpoint's name of a scalar head."""


def output_layer(spec: ModelSpec) -> Parameter:
    """The head of a last stage that has its own; that of a tied model is a second copy of the embedding."""
    if spec.head is Head.SCALAR:
        return Parameter("output_layer.weight", Kind.REPLICATED, (SCALAR_HEAD,))
    return Parameter("output_layer.weight", Kind.VOCABULARY, EMBEDDING.logical if spec.tied else ("lm_head.weight",))


def new_tensors(spec: ModelSpec) -> frozenset[str]:
    """Tensors that the model's folder does not hold: a scalar head on a language model's weights.

    They start at zero, which is the same under every layout; the head learns from the first step on, the layers under
    it from the second.
    """
    return frozenset((SCALAR_HEAD,) if spec.head is not spec.stored_head else ())


def layer_parameters(spec: ModelSpec, sparse: bool) -> list[Parameter]:
    """A layer's parameters but for its experts', in the order in which Megatron's layer uses them.

    Args:
        sparse: the MLP is a router over experts.
    """
    found = [
        Parameter("input_layernorm.weight", Kind.REPLICATED, ("input_layernorm.weight",)),
        *_projection("self_attention.linear_qkv", Kind.QKV, "self_attn.{}_proj", ("q", "k", "v"), spec.qkv_bias),
    ]
    if spec.qk_norm:
        found.append(Parameter("self_attention.q_layernorm.weight", Kind.REPLICATED, ("self_attn.q_norm.weight",)))
        found.append(Parameter("self_attention.k_layernorm.weight", Kind.REPLICATED, ("self_attn.k_norm.weight",)))
    found += _projection("self_attention.linear_proj", Kind.COLUMNS, "self_attn.{}_proj", ("o",), spec.o_bias)
    found.append(Parameter("pre_mlp_layernorm.weight", Kind.REPLICATED, ("post_attention_layernorm.weight",)))
    if sparse:
        return [*found, Parameter("mlp.router.weight", Kind.REPLICATED, (f"{_experts(spec).module}.gate.weight",))]
    found += _projection("mlp.linear_fc1", Kind.GATE_UP, "mlp.{}_proj", ("gate", "up"), spec.mlp_bias)
    return found + _projection("mlp.linear_fc2", Kind.COLUMNS, "mlp.{}_proj", ("down",), spec.mlp_bias)


def _projection(megatron: str, kind: Kind, pattern: str, parts: tuple[str, ...], bias: bool) -> list[Parameter]:
    """A linear layer's weight and, where it has one, its bias; that of a layer cut along its input is whole."""
    of_bias = Kind.REPLICATED if kind is Kind.COLUMNS else kind
    names = [("weight", kind), *([("bias", of_bias)] if bias else [])]
    return [Parameter(f"{megatron}.{n}", k, tuple(f"{pattern.format(part)}.{n}" for part in parts)) for n, k in names]


def expert_parameters(spec: ModelSpec) -> list[Parameter]:
    """An expert's parameters, with names inside the expert."""
    gate, up, down = (f"{part}.weight" for part in _experts(spec).projections)
    return [
        Parameter("linear_fc1.weight", Kind.GATE_UP, (gate, up)),
        Parameter("linear_fc2.weight", Kind.COLUMNS, (down,)),
    ]


def expert_prefix(spec: ModelSpec, expert: int) -> str:
    """What an expert's tensors begin with inside their layer of the checkpoint."""
    return f"{_experts(spec).module}.experts.{expert}."


def split_expert(spec: ModelSpec, name: str) -> tuple[int, str] | None:
    """(expert, name inside it) of a tensor inside a layer; None where it is no expert's."""
    prefix = f"{_experts(spec).module}.experts."
    expert, _, inside = name[len(prefix) :].partition(".")
    return (int(expert), inside) if name.startswith(prefix) and expert.isdecimal() else None


def expert_tensors(spec: ModelSpec, layer: int, expert: int) -> tuple[str, str, str]:
    """The checkpoint's names of an expert's gate, up and down projection."""
    gate, up, down = (layer_name(layer, f"{expert_prefix(spec, expert)}{name}") for name in expert_shapes(spec))
    return gate, up, down


def router_tensor(spec: ModelSpec, layer: int) -> str:
    """The checkpoint's name of a sparse layer's router."""
    return layer_name(layer, f"{_experts(spec).module}.gate.weight")


def _experts(spec: ModelSpec) -> ExpertNames:
    names = FAMILIES[spec.family].experts
    assert names is not None, f"{spec.family} has no experts"
    return names


def dense_shapes(spec: ModelSpec, sparse: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors but for its experts', by their name inside the layer."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    weights: dict[str, tuple[int, ...]] = {
        "input_layernorm": (spec.hidden,),
        "self_attn.q_proj": (queries, spec.hidden),
        "self_attn.k_proj": (keys, spec.hidden),
        "self_attn.v_proj": (keys, spec.hidden),
        "self_attn.q_norm": (spec.head_dim,),
        "self_attn.k_norm": (spec.head_dim,),
        "self_attn.o_proj": (spec.hidden, queries),
        "post_attention_layernorm": (spec.hidden,),
        "mlp.gate_proj": (spec.ffn, spec.hidden),
        "mlp.up_proj": (spec.ffn, spec.hidden),
        "mlp.down_proj": (spec.hidden, spec.ffn),
    }
    if sparse:
        weights[f"{_experts(spec).module}.gate"] = (spec.experts, spec.hidden)
    found = {}
    for name in (name for parameter in layer_parameters(spec, sparse) for name in parameter.logical):
        module, _, part = name.rpartition(".")
        found[name] = weights[module][:1] if part == "bias" else weights[module]
    return found


def expert_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of an expert's gate, up and down projection, by their name inside the expert."""
    gate, up, down = (f"{part}.weight" for part in _experts(spec).projections)
    return {
        gate: (spec.expert_ffn, spec.hidden),
        up: (spec.expert_ffn, spec.hidden),
        down: (spec.hidden, spec.expert_ffn),
    }


def end_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers, by their name in the checkpoint."""
    outputs = 1 if spec.head is Head.SCALAR else spec.vocab
    output = {} if spec.tied else {output_layer(spec).logical[0]: (outputs, spec.hidden)}
    return {EMBEDDING.logical[0]: (spec.vocab, spec.hidden), FINAL_NORM.logical[0]: (spec.hidden,), **output}


def logical_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name, with its shape; a tied output layer is not one."""
    ends, sparse_layers = end_shapes(spec), frozenset(spec.sparse_layers)
    inside = {False: dense_shapes(spec, False)}
    if spec.experts:
        experts = expert_shapes(spec).items()
        inside[True] = dense_shapes(spec, True) | {
            f"{expert_prefix(spec, expert)}{name}": shape for expert in range(spec.experts) for name, shape in experts
        }
    tensors = {EMBEDDING.logical[0]: ends.pop(EMBEDDING.logical[0])}
    for number in range(spec.layers):
        tensors |= {layer_name(number, name): shape for name, shape in inside[number in sparse_layers].items()}
    return tensors | ends


LAYER = "model.layers."
"""What every layer's tensors begin with in the checkpoint."""


def layer_name(number: int, name: str) -> str:
    """The checkpoint's name of tensor `name` of layer `number` (counted over the whole model)."""
    return f"{LAYER}{number}.{name}"


def layer_number(name: str) -> int | None:
    """The layer that a tensor of the checkpoint belongs to; None outside layers."""
    number = name[len(LAYER) :].partition(".")[0]
    return int(number) if name.startswith(LAYER) and number.isdecimal() else None
