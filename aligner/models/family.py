"""What a model family declares: how config.json is read, layer types, parameters and their sharding (no torch).

One instance for each family, in its own file under `aligner/models/families/`. Most families only set values; what no value
expresses is a method that the family's file overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from aligner.models.config_json import ConfigJson
from aligner.models.cuts import Block, Columns, Cut, GroupedQKV, Parameter, Replicated, Rows
from aligner.models.rope import Rope, RopeDefaults, read_rope
from aligner.models.spec import LayerType, ModelSpec, QKNorm

FULL, SLIDING, SPARSE = "full_attention", "sliding_attention", "sparse"
"""Usual names of layer types: causal attention with a dense MLP, sliding-window attention with one, a mixture of experts."""


@dataclass(frozen=True)
class Norms:
    """The checkpoint's names of a layer's RMSNorms, by position; None: no norm there.

    The norms after attention and MLP are applied before the residual is added.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


class Window(StrEnum):
    """How config.json's sliding_window applies."""

    REFUSED = "refused"
    """It must be null or absent: vLLM would apply it, whatever transformers' class does."""
    SWITCHED = "switched"
    """Only with use_sliding_window, which must be false; otherwise it is ignored."""
    EVERY_LAYER = "every layer"
    """In all layers; null: in none."""


@dataclass(frozen=True)
class Experts:
    """How a family names and chooses its experts: keys of config.json, and tensors inside a layer of the checkpoint."""

    count: tuple[str, ...]
    """Keys of the number of experts (they differ between releases of transformers); if several are present they must agree."""
    width: str
    """Key of the width of one expert."""
    module: str
    """The sparse MLP inside its layer; its router is `<module>.gate.weight`."""
    projections: tuple[str, str, str]
    """Gate, up and down projection inside `<module>.experts.<number>`."""
    norm_topk: bool | None = None
    """Whether the chosen experts' probabilities are divided by their sum; None: as config.json's norm_topk_prob says."""
    some_dense: bool = False
    """decoder_sparse_step and mlp_only_layers say which layers have experts; else all have."""


@dataclass(frozen=True)
class Defaults:
    """Defaults of transformers' configuration class for fields that config.json omits."""

    kv_heads: int | None = None
    """num_key_value_heads; None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden size / heads."""
    max_positions: int = 2048
    norm_eps: float = 1e-6
    """rms_norm_eps."""
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    tied: bool = False
    """tie_word_embeddings."""


@dataclass(frozen=True)
class EngineTraits:
    """Peculiarities of vLLM's model of the family."""

    ends_everywhere: bool = False
    """Every pipeline stage has the embedding, the final norm and the output layer, used or not."""
    output_bias: bool = False
    """The attention output may have a bias; vLLM would silently drop it in other families."""
    shared_kv_heads: bool = True
    """With more tensor-parallel ranks than key/value heads, ranks hold copies; False: vLLM refuses that."""
    fixed_head_dim: bool = False
    """It uses hidden size / heads and ignores head_dim."""
    note: str = ""
    """For docs/families.md: the vLLM model that runs it, and limits of its CPU build, with the error."""


_PROJECTIONS = {
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Family:
    """The properties of an architecture's decoders that config.json does not state."""

    model_type: str
    """config.json's "model_type"."""
    architecture: str
    """Class name in config.json's "architectures"."""
    title: str
    """For docs/families.md: well-known models of the family."""
    defaults: Defaults = Defaults()
    nullable: frozenset[str] = frozenset()
    """Those of num_key_value_heads, head_dim and attention_dropout that may be null, which means the default."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of this family only that change the computation, with the implemented values."""
    inert: frozenset[str] = frozenset()
    """Fields of this family only that have no effect, whatever their value."""
    qkv_bias: bool = False
    """Query, key and value projections always have a bias."""
    optional_biases: tuple[str, ...] = ()
    """Those of "attention_bias" (query, key, value, output) and "mlp_bias" (gate, up, down) that config.json may set."""
    divided_hidden: bool = False
    """transformers requires the number of heads to divide the hidden size, even with another head_dim."""
    partial_rotary: bool = False
    """transformers and vLLM both read partial_rotary_factor, the fraction of each head that is rotated."""
    keeps_null_head_dim: bool = False
    """transformers keeps a null head_dim, with which its "dynamic", "yarn" and "longrope" rotary embeddings fail."""
    window: Window = Window.REFUSED
    norms: Norms = Norms()
    norm_plus_one: bool = False
    """RMSNorm multiplies by 1 + weight."""
    qk_norm: QKNorm | None = None
    score_scalar: str | None = None
    """Field of config.json by whose square root attention scores are divided; None: head_dim."""
    score_scalar_default: int | None = None
    """Its value if config.json omits it."""
    activation_field: str = "hidden_act"
    """Name of the gate's activation in transformers' configuration class."""
    activations: tuple[str, ...] = ("silu",)
    """Accepted names of the gate's activation; within a family all mean the same function."""
    attention_note: str = ""
    """For docs/families.md, if `Window` does not describe the attention: which layers attend to what."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    experts: Experts | None = None
    """None: every MLP is dense."""
    engine: EngineTraits = EngineTraits()

    @property
    def classifier(self) -> str:
        """The architecture with a scalar head instead of the output layer."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")

    def read_layers(self, config: ConfigJson, layers: int) -> tuple[tuple[str, ...], dict[str, LayerType]]:
        """The name of each layer's type, and the types by name.

        Raises:
            ValueError: a window or layer types that the family does not have.
        """
        window = self._read_window(config)
        layer_type = SLIDING if window else FULL
        types = {layer_type: LayerType(window)}
        self._check_layer_types(config, layers, layer_type)
        sparse = self._sparse_layers(config, layers)
        if sparse:
            types[SPARSE] = LayerType(window, sparse=True)
        return tuple(SPARSE if number in sparse else layer_type for number in range(layers)), types

    def read_ropes(self, config: ConfigJson, defaults: RopeDefaults, names: Iterable[str]) -> dict[str, Rope]:
        """The rotary embedding of each of the named layer types; by default all have the same.

        Raises:
            ValueError: see `read_rope`.
        """
        defaults = replace(defaults, partial=self.partial_rotary, null_head_dim=self.keeps_null_head_dim)
        return dict.fromkeys(names, read_rope(config, defaults))

    def longest(self, ropes: Sequence[Rope], max_positions: int) -> int:
        """Maximum sequence length in tokens, from the rotary embeddings and max_position_embeddings."""
        return min(rope.longest(max_positions) for rope in ropes)

    def read_attention_scale(self, config: ConfigJson, head_dim: int) -> float:
        """Factor on the attention scores."""
        scalar = config.size(self.score_scalar, self.score_scalar_default) if self.score_scalar else head_dim
        return float(scalar**-0.5)

    def _read_window(self, config: ConfigJson) -> int | None:
        config.only("use_sliding_window", (False,))
        if self.window is Window.EVERY_LAYER:
            if config.get("sliding_window", self.defaults.sliding_window) is None:
                return None
            return config.size("sliding_window", self.defaults.sliding_window)
        if self.window is Window.SWITCHED:
            config.get("sliding_window")
        else:
            config.only("sliding_window", (None,))
        return None

    def _check_layer_types(self, config: ConfigJson, layers: int, expected: str) -> None:
        """Raises ValueError unless layer_types has `expected` (or its alias) for every layer."""
        types = config.get("layer_types")
        if types is None:
            return
        if not isinstance(types, list) or len(types) != layers:
            raise config.error(f"layer_types must be null or a list of as many entries as num_hidden_layers={layers}.")
        allowed = (FULL, "attention") if expected == FULL else (expected,)
        other = [name for name in types if name not in allowed]
        if other:
            raise config.error(f"layer_types has {other[0]!r}, which is not supported; only {expected!r} is.")

    def _sparse_layers(self, config: ConfigJson, layers: int) -> frozenset[int]:
        if self.experts is None:
            return frozenset()
        if not self.experts.some_dense:
            return frozenset(range(layers))
        step, skipped = config.size("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        if not isinstance(skipped, list) or any(type(layer) is not int for layer in skipped):
            raise config.error(f"mlp_only_layers={skipped!r} must be a list of layer numbers.")
        return frozenset(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in skipped)

    def block(self, spec: ModelSpec, part: str, kind: str = "weight") -> Block:
        """The block of the checkpoint that holds a projection, relative to its layer.

        Args:
            part: "q", "k", "v", "o", "gate", "up" or "down".
            kind: "weight" or "bias".
        """
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        rows = {"q": queries, "k": keys, "v": keys, "o": spec.hidden, "gate": spec.ffn, "up": spec.ffn}
        columns = {"o": queries, "down": spec.ffn}
        shape = rows.get(part, spec.hidden), columns.get(part, spec.hidden)
        return Block(f"{_PROJECTIONS[part]}.{kind}", shape if kind == "weight" else shape[:1])

    def parameters(self, spec: ModelSpec, layer_type: LayerType) -> list[Parameter]:
        """A layer's parameters except its experts', by Megatron's names, in the order of their use.

        The names are those of a GPTModel of local (not TransformerEngine) layers, with the norms after attention and MLP of
        `aligner.trainer.megatron.layers`.
        """

        def norm(storage: str, name: str | None) -> list[Parameter]:
            return [_replicated(storage, f"{name}.weight", spec.hidden)] if name else []

        return [
            *norm("input_layernorm.weight", self.norms.before_attention),
            *self._attention(spec),
            *norm("post_attention_norm.weight", self.norms.after_attention),
            *norm("pre_mlp_layernorm.weight", self.norms.before_mlp),
            *(self._router(spec) if layer_type.sparse else self._mlp(spec)),
            *norm("post_mlp_norm.weight", self.norms.after_mlp),
        ]

    def _attention(self, spec: ModelSpec) -> list[Parameter]:
        module = "self_attention"
        parameters = []
        for kind in _kinds(spec.qkv_bias):
            query, key, value = (self.block(spec, part, kind) for part in "qkv")
            parameters.append(Parameter(f"{module}.linear_qkv.{kind}", GroupedQKV(query, key, value, spec.kv_heads)))
        if spec.qk_norm:
            for part, heads in (("q", spec.heads), ("k", spec.kv_heads)):
                width = spec.head_dim * (heads if spec.qk_norm is QKNorm.PROJECTION else 1)
                parameters.append(
                    _replicated(f"{module}.{part}_layernorm.weight", f"self_attn.{part}_norm.weight", width)
                )
        return parameters + self._row_parallel(spec, f"{module}.linear_proj", "o", spec.o_bias)

    def _mlp(self, spec: ModelSpec) -> list[Parameter]:
        fused = [
            Parameter(f"mlp.linear_fc1.{kind}", Rows(tuple(self.block(spec, part, kind) for part in ("gate", "up"))))
            for kind in _kinds(spec.mlp_bias)
        ]
        return fused + self._row_parallel(spec, "mlp.linear_fc2", "down", spec.mlp_bias)

    def _row_parallel(self, spec: ModelSpec, storage: str, part: str, bias: bool) -> list[Parameter]:
        """A row-parallel linear layer; its bias is replicated."""
        cuts: dict[str, Cut] = {"weight": Columns(self.block(spec, part))}
        if bias:
            cuts["bias"] = Replicated(self.block(spec, part, "bias"))
        return [Parameter(f"{storage}.{kind}", cut) for kind, cut in cuts.items()]

    def _router(self, spec: ModelSpec) -> list[Parameter]:
        name = f"{self.named_experts.module}.gate.weight"
        return [Parameter("mlp.router.weight", Replicated(Block(name, (spec.experts, spec.hidden))))]

    def expert_parameters(self, spec: ModelSpec) -> list[Parameter]:
        """An expert's parameters, with names relative to the expert."""
        gate, up, down = (f"{part}.weight" for part in self.named_experts.projections)
        up_shape, down_shape = (spec.expert_ffn, spec.hidden), (spec.hidden, spec.expert_ffn)
        return [
            Parameter("linear_fc1.weight", Rows((Block(gate, up_shape), Block(up, up_shape)))),
            Parameter("linear_fc2.weight", Columns(Block(down, down_shape))),
        ]

    @property
    def named_experts(self) -> Experts:
        """`experts`, for families that have them."""
        assert self.experts is not None, f"{self.model_type} has no experts"
        return self.experts


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _replicated(storage: str, name: str, width: int) -> Parameter:
    return Parameter(storage, Replicated(Block(name, (width,))))
