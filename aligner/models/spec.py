"""A model's sizes and traits, read and checked from its Hugging Face folder (JSON only, no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.models.family import FAMILIES, Family, logical_tensors
from aligner.reshard.region import ELEMENT_BYTES


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model of one of the supported families."""

    family: str
    """Key of `FAMILIES`: "llama", "qwen2" or "qwen3"."""
    layers: int
    hidden: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; each serves heads / kv_heads query heads."""
    head_dim: int
    ffn: int
    """Width of the MLP."""
    vocab: int
    """Rows of the embedding in the checkpoint."""
    tied: bool
    """The output layer is the embedding."""
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or config.json's parameters of rope_type "llama3"."""
    qkv_bias: bool
    qk_norm: bool
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


def read_spec(path: str | Path) -> ModelSpec:
    """The model in folder `path`.

    Raises:
        ValueError: a missing folder or config.json, an architecture or a setting that is not supported, or sizes that
            do not fit together; the message says which and what would work.
    """
    folder = Path(path)
    config = read_config(folder)
    family_name, family = _family(config, folder)
    _check_supported(config, folder)
    heads, hidden = _size(config, "num_attention_heads", folder), _size(config, "hidden_size", folder)
    kv_heads = _size(config, "num_key_value_heads", folder, default=heads)
    if heads % kv_heads:
        raise ValueError(
            f"{folder}/config.json: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}."
        )
    theta, scaling = _rope(config, folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"{folder}/config.json: dtype={dtype!r} is not supported; use {', '.join(ELEMENT_BYTES)}.")
    return ModelSpec(
        family=family_name,
        layers=_size(config, "num_hidden_layers", folder),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size(config, "head_dim", folder, default=family.head_dim or hidden // heads),
        ffn=_size(config, "intermediate_size", folder),
        vocab=_size(config, "vocab_size", folder),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=_size(config, "max_position_embeddings", folder, default=family.max_positions),
        eos_token_ids=_eos_token_ids(config, folder),
        dtype=dtype,
        path=str(folder),
    )


def valid_tensor_sizes(spec: ModelSpec) -> list[int]:
    """Tensor-parallel sizes that can cut this model: common divisors of heads, key/value heads and MLP width."""
    return _divisors(math.gcd(spec.heads, spec.kv_heads, spec.ffn))


def valid_pipeline_sizes(spec: ModelSpec) -> list[int]:
    """Numbers of pipeline stages that divide the layers evenly."""
    return _divisors(spec.layers)


def check_sizes(spec: ModelSpec, tensor: int, pipeline: int, setting: str) -> None:
    """ValueError where the model cannot be cut so; `setting` is the role's placement, e.g. "placement.policy"."""
    if tensor not in valid_tensor_sizes(spec):
        raise ValueError(
            f"{setting}.tensor={tensor} does not divide the {spec.heads} heads, {spec.kv_heads} key/value heads and "
            f"MLP width {spec.ffn} of {spec.path}; use {_either(valid_tensor_sizes(spec))}."
        )
    if pipeline not in valid_pipeline_sizes(spec):
        raise ValueError(
            f"{setting}.pipeline={pipeline} does not divide the {spec.layers} layers of {spec.path}; "
            f"use {_either(valid_pipeline_sizes(spec))}."
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


def _family(config: Mapping[str, Any], folder: Path) -> tuple[str, Family]:
    """By architecture; by model_type where a config names no architecture."""
    named = config.get("architectures") or []
    for name, family in FAMILIES.items():
        if family.architecture in named or (not named and config.get("model_type") == name):
            return name, family
    found = named[0] if named else config.get("model_type")
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ValueError(f"{folder}/config.json: architecture {found} is not supported; supported are {supported}.")


def _check_supported(config: Mapping[str, Any], folder: Path) -> None:
    """Settings that would change the computation and are not implemented are refused, never ignored."""
    needed: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "hidden_act": ("silu", "swish", None),
        "quantization_config": (None,),
        "partial_rotary_factor": (1.0, None),
    }
    for key, allowed in needed.items():
        if config.get(key) not in allowed:
            raise ValueError(
                f"{folder}/config.json: {key}={config[key]!r} is not supported; only {key}={json.dumps(allowed[0])} is."
            )


def _rope(config: Mapping[str, Any], folder: Path) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling): from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
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


def _eos_token_ids(config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _either(sizes: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))
