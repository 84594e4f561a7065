"""A model's sizes and traits (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from aligner.models.rope import Rope


class Head(StrEnum):
    """What a model computes from the last hidden states."""

    LANGUAGE = "language"
    """Logits over the vocabulary: a separate or tied output layer."""
    SCALAR = "scalar"
    """One number per token: the tensor `score.weight` [1, hidden], no bias."""


class QKNorm(StrEnum):
    """Over what queries and keys are RMS-normalised."""

    HEAD = "head"
    """Over each head: weights [head_dim]."""
    PROJECTION = "projection"
    """Over all heads together: weights [heads * head_dim]."""


@dataclass(frozen=True)
class LayerType:
    """What differs between the layers of one model."""

    window: int | None = None
    """Number of tokens that a query attends to, itself included (transformers' sliding_window); None: all before it."""
    sparse: bool = False
    """The MLP is a mixture of experts."""
    rope: Rope = field(default_factory=Rope)
    """Rotary positions."""


SCALAR_HEAD = "score.weight"
"""A scalar head's tensor."""


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a model whose family `FAMILIES` does not have, as transformers saves them."""

    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor by name; a tied output layer has none."""
    embedding: str
    """Name of the embedding."""
    output: str | None
    """Name of the output layer, which files may hold although it is tied; None: the model has a scalar head."""
    architecture: str
    """transformers' class of the language model."""
    ignored: tuple[str, ...] = ()
    """Regular expressions, searched for in names: tensors that files may hold and transformers' class does not use, such as layers
    that predict further tokens."""
    latent: bool = False
    """Attention keeps one latent vector of each token (MLA), of `head_dim` elements, in place of keys and values."""


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model, with the head of a language model or a scalar one.

    Of a family that `FAMILIES` does not have, the fields about norms, biases, experts and layer types say nothing, and `tensors`
    says what its checkpoint holds: such a model runs on transformers' own class.
    """

    family: str
    """Key of `FAMILIES`, such as "qwen3_moe", or else config.json's model_type."""
    layers: int
    hidden: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; each serves heads / kv_heads query heads."""
    head_dim: int
    ffn: int
    """Width of a dense MLP."""
    vocab: int
    """Rows of the embedding in the checkpoint."""
    head: Head
    """The model's head."""
    stored_head: Head
    """The folder's head; if it differs, the model's head starts at zero (see `new_tensors`)."""
    tied: bool
    """The output layer is the embedding; never with a scalar head."""
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    """Gate, up and down projections of dense MLPs have a bias."""
    qk_norm: QKNorm | None
    """Over what queries and keys are RMS-normalised; None: they are not."""
    attention_scale: float
    """Factor on the attention scores."""
    activation: str
    """The gate's: "silu", or "gelu_tanh" (the tanh approximation)."""
    norm_plus_one: bool
    """RMSNorm multiplies by 1 + weight."""
    embedding_scale: float
    """Factor on the embeddings, rounded to the weights' data type before use."""
    experts: int
    """Experts of a sparse MLP; 0: every MLP is dense."""
    experts_per_token: int
    expert_ffn: int
    """Width of one expert."""
    norm_topk: bool
    """The chosen experts' probabilities are divided by their sum."""
    layer_types: tuple[str, ...]
    """Name of each layer's type."""
    types: dict[str, LayerType]
    """The layer types in use, by name."""
    max_positions: int
    """Longest sequence, in tokens."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text, from config.json and generation_config.json; may be empty."""
    dtype: str
    """Data type of the checkpoint's weights as config.json has it: "float32", "bfloat16" or "float16"."""
    path: str
    """The Hugging Face folder."""
    chat_template: str | None = None
    """The chat template that exports carry in place of the folder's; None: the folder's."""
    tensors: CheckpointTensors | None = None
    """None: the family is one of `FAMILIES`."""
    trust_remote_code: bool = False
    """The model's class is in the folder's Python files, which may be run."""

    @property
    def rope(self) -> dict[str, Rope]:
        """Rotary positions, by the name of the layer type."""
        return {name: layer_type.rope for name, layer_type in self.types.items()}

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers whose MLP is experts, ascending."""
        return tuple(number for number, name in enumerate(self.layer_types) if self.types[name].sparse)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the number of tokens that a query attends to, itself included; None: all before it."""
        return tuple(self.types[name].window for name in self.layer_types)

    @property
    def positions_text(self) -> str:
        """The maximum sequence length and, if rotary scaling limits it, the reason; for errors."""
        reasons = [rope.limit_reason for rope in self.rope.values() if rope.limit_reason]
        why = f" ({reasons[0]})" if reasons else ""
        return f"{self.max_positions} positions of the model in {self.path}{why}"

    @property
    def parameters_of_experts(self) -> int:
        """Weights that belong to one expert each."""
        return 3 * self.hidden * self.expert_ffn * self.experts * len(self.sparse_layers)


def with_scalar_head(spec: ModelSpec) -> ModelSpec:
    """The same model with a scalar head: the folder's, or a new one on the layers of a language model."""
    scalar = replace(spec, head=Head.SCALAR, tied=False)
    if spec.tensors is None or spec.head is Head.SCALAR:
        return scalar
    shapes = {name: shape for name, shape in spec.tensors.shapes.items() if name != spec.tensors.output}
    return replace(scalar, tensors=replace(spec.tensors, shapes={**shapes, SCALAR_HEAD: (1, spec.hidden)}, output=None))
