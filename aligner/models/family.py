"""What a model family declares: how config.json is read, its layer types, its parameters and their cuts (no torch).

One instance for each family, in a file of its own under `aligner/models/families/`; most are values alone, and what no
value here says is a method that the family's file overrides.
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
"""Usual names of layer types: causal attention and a dense MLP, the same within a window, a router over experts."""


@dataclass(frozen=True)
class Norms:
    """The RMSNorms of a layer, by where they stand: the checkpoint's names, None where there is none.

    What stands after is computed before the residual is added.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


class Window(StrEnum):
    """Where config.json's sliding_window counts."""

    REFUSED = "refused"
    """It must be null or absent: the engine would take it, whatever transformers' class does."""
    SWITCHED = "switched"
    """use_sliding_window says whether, and must be false; without it the width is that of nothing."""
    EVERY_LAYER = "every layer"
    """In all layers; null: none."""


@dataclass(frozen=True)
class Experts:
    """How a family names and chooses its experts: keys of config.json, and tensors inside a layer of the checkpoint."""

    count: tuple[str, ...]
    """Keys of the number of experts (releases of transformers differ); where both are there they must agree."""
    width: str
    """Key of the width of one expert."""
    module: str
    """The sparse MLP inside its layer; its router is `<module>.gate.weight`."""
    projections: tuple[str, str, str]
    """Gate, up and down projection inside `<module>.experts.<number>`."""
    norm_topk: bool | None = None
    """Whether the chosen experts' probabilities are divided by their sum; None: config.json's norm_topk_prob says."""
    some_dense: bool = False
    """decoder_sparse_step and mlp_only_layers say which layers have experts; else all have."""


@dataclass(frozen=True)
class Defaults:
    """What transformers' configuration class takes where config.json leaves a field out."""

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
    """What vLLM's model of the family does otherwise than most."""

    ends_everywhere: bool = False
    """It makes the embedding, the last norm and the output layer in every pipeline stage, used or not."""
    output_bias: bool = False
    """The attention output may have a bias; in others the engine would drop it silently."""
    shared_kv_heads: bool = True
    """Beyond the key/value heads each tensor rank gets a copy of one; False: more ranks than these it refuses."""
    fixed_head_dim: bool = False
    """It takes hidden size / heads, whatever head_dim says."""
    note: str = ""
    """For the table of families: by which model the engine runs it, and what its CPU build cannot, with the error."""


_PROJECTIONS = {
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Family:
    """What the decoders of one architecture have in common and their config.json does not say."""

    model_type: str
    """config.json's "model_type"."""
    architecture: str
    """Class name in config.json's "architectures"."""
    title: str
    """For the table of families: models that are of this family."""
    defaults: Defaults = Defaults()
    nullable: frozenset[str] = frozenset()
    """Of num_key_value_heads, head_dim and attention_dropout, those that may be null, which means the usual value."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of this family alone that would change the computation, with the values that are implemented."""
    inert: frozenset[str] = frozenset()
    """Fields of this family alone that change nothing, whatever their value."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias whatever config.json says."""
    optional_biases: tuple[str, ...] = ()
    """Of "attention_bias" (query, key, value, output) and "mlp_bias" (gate, up, down), those that config.json may set."""
    divided_hidden: bool = False
    """transformers wants a hidden size that the heads divide, even where head_dim is another."""
    partial_rotary: bool = False
    """partial_rotary_factor says how much of each head is rotated; transformers' class and the engine's both read it."""
    keeps_null_head_dim: bool = False
    """transformers leaves a null head_dim as it is, which its "dynamic", "yarn" and "longrope" rotary positions cannot read."""
    window: Window = Window.REFUSED
    norms: Norms = Norms()
    norm_plus_one: bool = False
    """RMSNorm multiplies by 1 + weight."""
    qk_norm: QKNorm | None = None
    score_scalar: str | None = None
    """Field of config.json that scores are divided by the square root of; None: head_dim is."""
    score_scalar_default: int | None = None
    """Where config.json leaves it out."""
    activation_field: str = "hidden_act"
    """Where transformers' class has the activation of the gate."""
    activations: tuple[str, ...] = ("silu",)
    """Names in config.json of the activation of the gate; all of one family mean the same function."""
    attention_note: str = ""
    """For the table of families, where the window is none of `Window`: which layers see what."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    experts: Experts | None = None
    """None: every MLP is dense."""
    engine: EngineTraits = EngineTraits()

    @property
    def classifier(self) -> str:
        """The architecture with a scalar head in place of the output layer."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")

    def read_layers(self, config: ConfigJson, layers: int) -> tuple[tuple[str, ...], dict[str, LayerType]]:
        """The name of each layer's type, and the types by name.

        Raises:
            ValueError: a window or layer types that are not those of the family.
        """
        window = self._read_window(config)
        usual = SLIDING if window else FULL
        types = {usual: LayerType(window)}
        self._check_layer_types(config, layers, usual)
        sparse = self._sparse_layers(config, layers)
        if sparse:
            types[SPARSE] = LayerType(window, sparse=True)
        return tuple(SPARSE if number in sparse else usual for number in range(layers)), types

    def read_ropes(self, config: ConfigJson, defaults: RopeDefaults, names: Iterable[str]) -> dict[str, Rope]:
        """The rotary positions of each of the named layer types; here all have the same.

        Raises:
            ValueError: see `read_rope`.
        """
        defaults = replace(defaults, partial=self.partial_rotary, null_head_dim=self.keeps_null_head_dim)
        return dict.fromkeys(names, read_rope(config, defaults))

    def longest(self, ropes: Sequence[Rope], max_positions: int) -> int:
        """The longest sequence, in tokens, for these rotary positions and config.json's positions."""
        return min(rope.longest(max_positions) for rope in ropes)

    def read_attention_scale(self, config: ConfigJson, head_dim: int) -> float:
        """Factor on the scores of attention."""
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

    def _check_layer_types(self, config: ConfigJson, layers: int, usual: str) -> None:
        """One entry for each layer, in transformers' words; all layers are of one kind of attention."""
        types = config.get("layer_types")
        if types is None:
            return
        if not isinstance(types, list) or len(types) != layers:
            raise config.error(f"layer_types must be null or a list of as many entries as num_hidden_layers={layers}.")
        allowed = (FULL, "attention") if usual == FULL else (usual,)
        other = [one for one in types if one not in allowed]
        if other:
            raise config.error(f"layer_types has {other[0]!r}, which is not supported; only {usual!r} is.")

    def _sparse_layers(self, config: ConfigJson, layers: int) -> frozenset[int]:
        if self.experts is None:
            return frozenset()
        if not self.experts.some_dense:
            return frozenset(range(layers))
        step, skipped = config.size("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        if not isinstance(skipped, list) or any(type(layer) is not int for layer in skipped):
            raise config.error(f"mlp_only_layers={skipped!r} must be a list of layer numbers.")
        return frozenset(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in skipped)

    def block(self, spec: ModelSpec, part: str, what: str = "weight") -> Block:
        """Where the checkpoint keeps a projection, inside a layer.

        Args:
            part: "q", "k", "v", "o", "gate", "up" or "down".
            what: "weight" or "bias".
        """
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        rows = {"q": queries, "k": keys, "v": keys, "o": spec.hidden, "gate": spec.ffn, "up": spec.ffn}
        columns = {"o": queries, "down": spec.ffn}
        shape = rows.get(part, spec.hidden), columns.get(part, spec.hidden)
        return Block(f"{_PROJECTIONS[part]}.{what}", shape if what == "weight" else shape[:1])

    def parameters(self, spec: ModelSpec, layer_type: LayerType) -> list[Parameter]:
        """A layer's parameters but for its experts', by the names of Megatron's layer, in the order of their use.

        Of a GPTModel of local (not TransformerEngine) layers, with the norms after attention and MLP of
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
        at = "self_attention"
        parameters = []
        for what in _kinds(spec.qkv_bias):
            query, key, value = (self.block(spec, part, what) for part in "qkv")
            parameters.append(Parameter(f"{at}.linear_qkv.{what}", GroupedQKV(query, key, value, spec.kv_heads)))
        if spec.qk_norm:
            for part, heads in (("q", spec.heads), ("k", spec.kv_heads)):
                width = spec.head_dim * (heads if spec.qk_norm is QKNorm.PROJECTION else 1)
                parameters.append(_replicated(f"{at}.{part}_layernorm.weight", f"self_attn.{part}_norm.weight", width))
        return parameters + self._row_parallel(spec, f"{at}.linear_proj", "o", spec.o_bias)

    def _mlp(self, spec: ModelSpec) -> list[Parameter]:
        fused = [
            Parameter(f"mlp.linear_fc1.{what}", Rows(tuple(self.block(spec, part, what) for part in ("gate", "up"))))
            for what in _kinds(spec.mlp_bias)
        ]
        return fused + self._row_parallel(spec, "mlp.linear_fc2", "down", spec.mlp_bias)

    def _row_parallel(self, spec: ModelSpec, storage: str, part: str, bias: bool) -> list[Parameter]:
        """A linear layer cut along its input; its bias is whole on every rank."""
        cuts: dict[str, Cut] = {"weight": Columns(self.block(spec, part))}
        if bias:
            cuts["bias"] = Replicated(self.block(spec, part, "bias"))
        return [Parameter(f"{storage}.{what}", cut) for what, cut in cuts.items()]

    def _router(self, spec: ModelSpec) -> list[Parameter]:
        name = f"{self.named_experts.module}.gate.weight"
        return [Parameter("mlp.router.weight", Replicated(Block(name, (spec.experts, spec.hidden))))]

    def expert_parameters(self, spec: ModelSpec) -> list[Parameter]:
        """An expert's parameters, with names inside the expert."""
        gate, up, down = (f"{part}.weight" for part in self.named_experts.projections)
        wide, back = (spec.expert_ffn, spec.hidden), (spec.hidden, spec.expert_ffn)
        return [
            Parameter("linear_fc1.weight", Rows((Block(gate, wide), Block(up, wide)))),
            Parameter("linear_fc2.weight", Columns(Block(down, back))),
        ]

    @property
    def named_experts(self) -> Experts:
        """Of a family that has experts."""
        assert self.experts is not None, f"{self.model_type} has no experts"
        return self.experts


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _replicated(storage: str, name: str, width: int) -> Parameter:
    return Parameter(storage, Replicated(Block(name, (width,))))
