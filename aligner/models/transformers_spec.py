"""`ModelSpec` of a model that only transformers knows: sizes from its configuration class, tensors from its model class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner.models.spec import CheckpointTensors, Head, LayerType, ModelSpec
from aligner.models.transformers_model import checkpoint_shapes, empty_model, model_class, read_config, stored_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER = "attention"
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


def transformers_spec(
    folder: Path,
    head: Head,
    architectures: Sequence[str] | None,
    dtype: str,
    eos_token_ids: tuple[int, ...],
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Read the folder's model with transformers.

    Args:
        architectures: config.json's.
        dtype: data type of the checkpoint's weights.
        trust_remote_code: the class is in the folder's Python files.

    Raises:
        ValueError: transformers does not know it, its class is not that of `architectures`, or its tensors cannot be traced.
    """
    config = read_config(folder, head, trust_remote_code)
    sizes: dict[str, Any] = {name: _largest(config, name) for name in _SIZES}
    lacking = [name for name, size in sizes.items() if not isinstance(size, int)]
    if lacking:
        raise ValueError(
            f"{folder}/config.json: a {config.model_type} model has no {lacking[0]}, so it is no language model of one "
            "decoder, which alone are supported."
        )
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise ValueError(f"{folder}/config.json: {small[0]} must be a positive whole number, found {sizes[small[0]]}.")
    kind = model_class(config, head, folder, trust_remote_code)
    if architectures and architectures[0] != kind.__name__:
        raise ValueError(
            f"{folder}/config.json: architectures={list(architectures)}, and transformers' class of "
            f"model_type={config.model_type!r} is {kind.__name__}; set both to what the weights are of."
        )
    model = empty_model(folder, head, trust_remote_code=trust_remote_code)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    tied = output is not None and output.weight is embedding.weight
    shapes = checkpoint_shapes(folder, head, trust_remote_code)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise ValueError(
            f"{folder}/config.json: its sizes leave nothing of {empty[0]}, of shape {shapes[empty[0]]}; set those of the weights."
        )
    language = model_class(config, Head.LANGUAGE, folder, trust_remote_code)
    heads, latent = sizes["num_attention_heads"], getattr(config, "kv_lora_rank", None)
    head_dim = _largest(config, "head_dim") or sizes["hidden_size"] // heads
    return ModelSpec(
        family=config.model_type,
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        heads=heads,
        kv_heads=1 if latent else _largest(config, "num_key_value_heads") or heads,
        head_dim=latent + config.qk_rope_head_dim if latent else head_dim,
        ffn=_largest(config, "intermediate_size") or 4 * sizes["hidden_size"],
        vocab=sizes["vocab_size"],
        head=head,
        stored_head=head,
        tied=tied,
        norm_eps=0.0,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=None,
        attention_scale=0.0,
        activation="",
        norm_plus_one=False,
        embedding_scale=1.0,
        experts=0,
        experts_per_token=0,
        expert_ffn=0,
        norm_topk=False,
        layer_types=(_LAYER,) * sizes["num_hidden_layers"],
        types={_LAYER: LayerType()},
        max_positions=_max_positions(config),
        eos_token_ids=eos_token_ids,
        dtype=dtype,
        path=str(folder),
        tensors=CheckpointTensors(
            shapes,
            stored_name(model, names[id(embedding)]),
            stored_name(model, names[id(output)]) if output is not None else None,
            language.__name__,
            f"{model.base_model_prefix}." if model.base_model_prefix else "",
            tuple(model._keys_to_ignore_on_load_unexpected or ()),
            latent is not None,
        ),
        trust_remote_code=trust_remote_code,
    )


def _max_positions(config: PreTrainedConfig) -> int:
    """Longest sequence in tokens. With rotary positions of type longrope transformers computes longer ones with other frequencies,
    for all rows of a batch that has one."""
    entry = getattr(config, "rope_parameters", None) or {}
    entries = [entry, *(value for value in entry.values() if isinstance(value, dict))]
    most = config.max_position_embeddings
    bounds = [
        one.get("original_max_position_embeddings", most) for one in entries if one.get("rope_type") == "longrope"
    ]
    return int(min([most, *bounds]))


def _largest(config: PreTrainedConfig, name: str) -> Any:
    """A size of the configuration, the largest where layers differ; None: there is none."""
    differ = name in (getattr(config, "per_layer_attributes", None) or ())
    values = [getattr(one, name, None) for one in (config.per_layer_config if differ else [config])]
    sizes = [size for value in values for size in (value if isinstance(value, list | tuple) else [value])]
    return max((size for size in sizes if size is not None), default=None)
