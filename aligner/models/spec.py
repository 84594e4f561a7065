"""A model's sizes and traits, read and checked from its Hugging Face folder (JSON only, no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligner.models.family import FAMILIES, Family, Head, logical_tensors
from aligner.reshard.region import ELEMENT_BYTES


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
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or config.json's parameters of rope_type "llama3"."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    """Gate, up and down projections of dense MLPs have a bias."""
    qk_norm: bool
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
    sparse_layers: tuple[int, ...]
    """Layers whose MLP is experts, ascending."""
    max_positions: int
    """Longest sequence, in tokens."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text, from config.json and generation_config.json; may be empty."""
    dtype: str
    """Data type of the checkpoint's weights as config.json has it: "float32", "bfloat16" or "float16"."""
    path: str
    """The Hugging Face folder."""

    @property
    def parameters(self) -> int:
        """Number of weights; a tied output layer counts once."""
        return sum(math.prod(shape) for shape in logical_tensors(self).values())

    @property
    def parameters_of_experts(self) -> int:
        """Those of them that belong to one expert."""
        return 3 * self.hidden * self.expert_ffn * self.experts * len(self.sparse_layers)


def with_scalar_head(spec: ModelSpec) -> ModelSpec:
    """The same model with a scalar head: the folder's, or a new one on the layers of a language model."""
    return replace(spec, head=Head.SCALAR, tied=False)


def read_spec(path: str | Path) -> ModelSpec:
    """The model in folder `path`, a language model or one with a scalar head.

    Raises:
        ValueError: a missing folder or config.json, an architecture or a setting that is not supported, or sizes that
            do not fit together; the message says which and what would work.
    """
    folder = Path(path)
    config = read_config(folder)
    family_name, family, head = _family(config, folder)
    _check_supported(config, family, folder)
    heads, hidden = _size(config, "num_attention_heads", folder), _size(config, "hidden_size", folder)
    kv_heads = _size(config, "num_key_value_heads", folder, default=heads)
    if heads % kv_heads:
        raise ValueError(
            f"{folder}/config.json: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}."
        )
    theta, scaling = _rope(config, family, folder)
    layers = _size(config, "num_hidden_layers", folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"{folder}/config.json: dtype={dtype!r} is not supported; use {', '.join(ELEMENT_BYTES)}.")
    return ModelSpec(
        family=family_name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size(config, "head_dim", folder, default=family.head_dim or hidden // heads),
        ffn=_size(config, "intermediate_size", folder),
        vocab=_size(config, "vocab_size", folder),
        head=head,
        stored_head=head,
        tied=head is Head.LANGUAGE and bool(config.get("tie_word_embeddings", family.tied)),
        norm_eps=float(config.get("rms_norm_eps", family.norm_eps)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias or bool(config.get("attention_bias")),
        o_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm,
        activation="gelu_tanh" if "gelu_pytorch_tanh" in family.activations else "silu",
        norm_plus_one=family.norm_plus_one,
        embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
        **_experts(config, family, layers, folder),
        max_positions=_size(config, "max_position_embeddings", folder, default=family.max_positions),
        eos_token_ids=end_tokens(config, folder),
        dtype=dtype,
        path=str(folder),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder; ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"model.path={folder} is not a folder; give the folder of a Hugging Face checkpoint.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path={folder} has no config.json; give the folder of a Hugging Face checkpoint.")
    return _json_object(folder / "config.json")


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON or not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(found).__name__}.")
    return found


def _family(config: Mapping[str, Any], folder: Path) -> tuple[str, Family, Head]:
    """By architecture; by model_type, as a language model, where a config names no architecture."""
    named = config.get("architectures") or []
    for name, family in FAMILIES.items():
        if family.architecture in named or (not named and config.get("model_type") == name):
            return name, family, Head.LANGUAGE
        if family.classifier in named:
            _check_one_score(config, folder)
            return name, family, Head.SCALAR
    found = named[0] if named else config.get("model_type")
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ValueError(
        f"{folder}/config.json: architecture {found} is not supported; supported are {supported}, and each as "
        "...ForSequenceClassification with num_labels=1."
    )


def _check_one_score(config: Mapping[str, Any], folder: Path) -> None:
    """Transformers writes the number of labels as `id2label`, and takes two where nothing is said."""
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
    if labels != 1:
        raise ValueError(
            f"{folder}/config.json: num_labels={labels} is not supported: a critic or a reward model gives one number; "
            "use a model with num_labels=1 (one entry in id2label), or a language model, which gets a new head."
        )


def _check_supported(config: Mapping[str, Any], family: Family, folder: Path) -> None:
    """Settings that would change the computation and are not implemented are refused, never ignored."""
    biases = {key: (False, None) for key in ("attention_bias", "mlp_bias") if key not in family.optional_biases}
    needed: dict[str, tuple[Any, ...]] = {
        **biases,
        **family.only,
        "use_sliding_window": (False, None),
        "hidden_act": (*family.activations, None),
        "hidden_activation": (family.activations[0], None),  # as transformers 4 names Gemma's
        "quantization_config": (None,),
        "partial_rotary_factor": (1.0, None),
    }
    for key, allowed in needed.items():
        if config.get(key) not in allowed:
            raise ValueError(
                f"{folder}/config.json: {key}={config[key]!r} is not supported; only {key}={json.dumps(allowed[0])} is."
            )


def _experts(config: Mapping[str, Any], family: Family, layers: int, folder: Path) -> dict[str, Any]:
    """The fields of ModelSpec that describe sparse MLPs."""
    dense = {"experts": 0, "experts_per_token": 0, "expert_ffn": 0, "norm_topk": False, "sparse_layers": ()}
    if family.experts is None:
        return dense
    key = next((key for key in family.experts.count if key in config), family.experts.count[0])
    experts, chosen = _size(config, key, folder), _size(config, "num_experts_per_tok", folder)
    if chosen > experts:
        raise ValueError(f"{folder}/config.json: num_experts_per_tok={chosen} is more than {key}={experts}.")
    step, skipped = _size(config, "decoder_sparse_step", folder, default=1), config.get("mlp_only_layers") or []
    if not isinstance(skipped, list) or any(type(layer) is not int for layer in skipped):
        raise ValueError(f"{folder}/config.json: mlp_only_layers={skipped!r} must be a list of layer numbers.")
    sparse = tuple(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in skipped)
    if not sparse:
        return dense
    norm_topk = bool(config.get("norm_topk_prob", False)) if family.norm_topk is None else family.norm_topk
    width = _size(config, family.experts.width, folder)
    return {
        "experts": experts,
        "experts_per_token": chosen,
        "expert_ffn": width,
        "norm_topk": norm_topk,
        "sparse_layers": sparse,
    }


def _rope(config: Mapping[str, Any], family: Family, folder: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling): from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or family.rope_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{folder}/config.json: rope_theta={theta!r} must be a positive number.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{folder}/config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; use 1."
        )
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(
            f"{folder}/config.json: rope_type={kind!r} is not supported; supported are 'default' and 'llama3'."
        )
    wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in wanted if not isinstance(rope.get(key), int | float)]
    if missing:
        raise ValueError(f"{folder}/config.json: rope_type 'llama3' needs a number for {', '.join(missing)}.")
    return float(theta), {"rope_type": "llama3", **{key: rope[key] for key in wanted}}


def end_tokens(config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """Both files' end tokens: chat models often end turns with one that only generation_config.json names."""
    generation = folder / "generation_config.json"
    found: list[int] = []
    for source in (config, _json_object(generation) if generation.is_file() else {}):
        ids = source.get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(found))


def _size(config: Mapping[str, Any], key: str, folder: Path, default: int | None = None) -> int:
    found = config.get(key)
    if found is None:
        found = default
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{folder}/config.json: {key} must be a positive whole number, found {found!r}.")
    return found
