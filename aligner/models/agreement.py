"""Checks that transformers (and vLLM, which reads through it) interprets config.json as the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aligner.models.family import FULL, SLIDING
from aligner.models.read_spec import read_config
from aligner.models.spec import Head, ModelSpec
from aligner.models.tensors import family_of


def check_reading(spec: ModelSpec) -> None:
    """Load the model's configuration with transformers and compare it with `spec`.

    Raises:
        ValueError: transformers refuses it or interprets a field otherwise; the message names the field.
    """
    if spec.tensors is not None:  # it is transformers' own reading
        return
    from transformers import AutoConfig  # imported here: it takes a second

    try:
        config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
    except Exception as error:  # the exception types differ between releases
        reason = " ".join(str(error).split())
        raise ValueError(f"{spec.path}/config.json: transformers cannot read {_culprit(spec)}: {reason}") from error
    check_agreement(spec, config, "transformers")


def _culprit(spec: ModelSpec) -> str:
    """The field without which transformers could read the file, since its own errors may not name it."""
    from transformers import AutoConfig

    fields = read_config(Path(spec.path))
    if fields.pop("model_type", None) is None:
        return "it without a model_type"
    for key, value in {"": None, **fields}.items():
        others = {name: field for name, field in fields.items() if name != key}
        try:
            AutoConfig.for_model(spec.family, **others)
        except Exception:
            continue
        return f"{key}={value!r}" if key else "it"
    return "it"


def check_agreement(spec: ModelSpec, config: Any, reader: str) -> None:
    """Raises ValueError naming the first field in which `config` (a transformers configuration) differs from `spec`.

    Args:
        reader: the library that loaded `config`, for the message.
    """
    if spec.tensors is not None:
        return
    field_of = _field_reader(config, spec)
    fields = [(key, field_of(key), value) for key, value in _expected(spec).items()]
    for key, theirs, ours in [*fields, *_rope_fields(config, spec)]:
        if theirs != ours:
            raise ValueError(
                f"{spec.path}/config.json: {reader} takes it for {key}={theirs!r}, the trained model has {ours!r}; "
                f"set {key} in config.json, once and plainly."
            )


def _field_reader(config: Any, spec: ModelSpec) -> Callable[[str], Any]:
    """A function that returns a field of the configuration by its name in `_expected`."""

    def field_of(key: str) -> Any:
        value = getattr(config, key, None)
        match key:
            case "head_dim":
                return value or config.hidden_size // config.num_attention_heads
            case "layer_types":  # a class without layer_types applies the window to every layer
                return value or [SLIDING if getattr(config, "sliding_window", None) else FULL] * spec.layers
            case "attention_bias" | "mlp_bias":
                return bool(value)
            case "sliding_window":  # no layer uses it
                return value if SLIDING in (getattr(config, "layer_types", None) or [SLIDING]) else None
            case "hidden_act" | "hidden_activation":
                names = family_of(spec).activations
                return names[0] if value in names else value
        return value

    return field_of


def _expected(spec: ModelSpec) -> dict[str, Any]:
    """The model's values of the fields to compare, by transformers' names."""
    expected = {
        "model_type": spec.family,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "mlp_bias": spec.mlp_bias,
        "attention_bias": spec.o_bias,
        family_of(spec).activation_field: family_of(spec).activations[0],
        "layer_types": [SLIDING if window else FULL for window in spec.windows],
        "sliding_window": max(window or 0 for window in spec.windows) or None,
    }
    scalar = family_of(spec).score_scalar
    if scalar:
        expected[scalar] = round(spec.attention_scale**-2)
    if spec.head is Head.LANGUAGE:
        expected["tie_word_embeddings"] = spec.tied
    names = family_of(spec).experts
    if names is not None and spec.experts:
        expected |= {"num_local_experts": spec.experts, "num_experts_per_tok": spec.experts_per_token}
        expected[names.width] = spec.expert_ffn
        if names.norm_topk is None:
            expected["norm_topk_prob"] = spec.norm_topk
    if len(spec.sparse_layers) < spec.layers:
        expected["intermediate_size"] = spec.ffn
    return expected


def _rope_fields(config: Any, spec: ModelSpec) -> Iterator[tuple[str, Any, Any]]:
    """(name, the configuration's value, ours) of each rotary parameter of each layer type."""
    entry = getattr(config, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in entry.values())
    for name, rope in spec.rope.items():
        theirs = {"partial_rotary_factor": 1.0, **((entry.get(name) or {}) if nested else entry)}
        ours = {
            "rope_type": rope.rope_type,
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.partial_rotary_factor,
        }
        for key, value in {**ours, **rope.parameters}.items():
            yield key, theirs.get(key), value
