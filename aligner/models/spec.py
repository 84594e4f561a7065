"""A model's sizes and traits (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from aligner.models.rope import Rope


class Head(StrEnum):
    """What a model makes of the last hidden states."""

    LANGUAGE = "language"
    """Logits over the vocabulary: an output layer of its own, or the embedding again."""
    SCALAR = "scalar"
    """One number a token: the tensor `score.weight` [1, hidden], no bias."""


class QKNorm(StrEnum):
    """What one RMSNorm of queries, and one of keys, is taken over."""

    HEAD = "head"
    """Each head for itself: weights [head_dim]."""
    PROJECTION = "projection"
    """All heads together, before they are told apart: weights [heads * head_dim]."""


@dataclass(frozen=True)
class LayerType:
    """What differs between the layers of one model."""

    window: int | None = None
    """A query sees this many tokens, itself the last of them (transformers' sliding_window); None: all before it."""
    sparse: bool = False
    """The MLP is a router over experts."""
    rope: Rope = field(default_factory=Rope)
    """Rotary positions."""


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model of one of the supported families, with the head of a language model or a scalar one."""

    family: str
    """Key of `FAMILIES`, such as "qwen3_moe"."""
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
    """What the model has on top."""
    stored_head: Head
    """What the folder has; where the two differ, the head starts at zero (see `new_tensors`)."""
    tied: bool
    """The output layer is the embedding; never with a scalar head."""
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    """Gate, up and down projections of dense MLPs have a bias."""
    qk_norm: QKNorm | None
    """What queries and keys are RMS-normalised over; None: they are not."""
    attention_scale: float
    """Factor on the scores of attention."""
    activation: str
    """Of the gate: "silu", or "gelu_tanh" (the tanh approximation)."""
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
    """Of each layer, the name of its type."""
    types: dict[str, LayerType]
    """By name; only those that a layer has."""
    max_positions: int
    """Longest sequence, in tokens."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text, from config.json and generation_config.json; may be empty."""
    dtype: str
    """Data type of the checkpoint's weights as config.json has it: "float32", "bfloat16" or "float16"."""
    path: str
    """The Hugging Face folder."""

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
        """Of each layer, how many tokens a query sees, itself the last of them; None: all before it."""
        return tuple(self.types[name].window for name in self.layer_types)

    @property
    def positions_text(self) -> str:
        """How long a sequence may be and, where the scaling of rotary positions limits it, why; for errors."""
        reasons = [rope.limit_reason for rope in self.rope.values() if rope.limit_reason]
        why = f" ({reasons[0]})" if reasons else ""
        return f"{self.max_positions} positions of the model in {self.path}{why}"

    @property
    def parameters_of_experts(self) -> int:
        """Weights that belong to one expert each."""
        return 3 * self.hidden * self.expert_ffn * self.experts * len(self.sparse_layers)


def with_scalar_head(spec: ModelSpec) -> ModelSpec:
    """The same model with a scalar head: the folder's, or a new one on the layers of a language model."""
    return replace(spec, head=Head.SCALAR, tied=False)
