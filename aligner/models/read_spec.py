"""Read and check a model's `ModelSpec` from its Hugging Face folder (JSON only, no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aligner.models.config_json import ConfigJson, same
from aligner.models.families import FAMILIES
from aligner.models.family import Family
from aligner.models.inert_fields import LENGTHS, check_auto_map, check_unread, names_model_code
from aligner.models.remote_code import check_in_folder
from aligner.models.rope import Rope, RopeDefaults
from aligner.models.spec import Head, ModelSpec
from aligner.reshard.plan.region import ELEMENT_BYTES


def read_spec(path: str | Path, trust_remote_code: bool = False) -> ModelSpec:
    """The model in folder `path`, a language model or one with a scalar head.

    Args:
        trust_remote_code: Python files of the folder that its config.json names (auto_map) may be run.

    Raises:
        ValueError: a missing folder or config.json, an architecture or a setting that is not supported, or sizes that
            do not fit together; the message says which and what would work.
    """
    folder = Path(path)
    fields = read_config(folder)
    config = ConfigJson(folder, fields)
    if trust_remote_code and names_model_code(fields.get("auto_map")):
        return _of_transformers(config, fields, True)
    family_name, family, head = _family(config)
    if family is None:
        return _of_transformers(config, fields, False)
    _check_supported(config, family)
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    layers = config.size("num_hidden_layers")
    layer_types, types = family.read_layers(config, layers)
    attention_bias = config.flag("attention_bias")
    qkv_bias = family.qkv_bias or attention_bias
    if not same(config.get("qkv_bias", qkv_bias), qkv_bias):  # vLLM prefers it to attention_bias
        raise config.error(
            f"qkv_bias={config.get('qkv_bias')!r} is not supported; leave it out, which means {qkv_bias}."
        )
    most = config.size("max_position_embeddings", family.defaults.max_positions)
    head_dim = _head_dim(config, family, hidden, heads)
    ropes = family.read_ropes(config, RopeDefaults(family.defaults.rope_theta, most, head_dim), types)
    types = {name: replace(types[name], rope=ropes[name]) for name in types if name in layer_types}
    spec = ModelSpec(
        family=family_name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, family, heads),
        head_dim=head_dim,
        ffn=config.size("intermediate_size"),
        vocab=config.size("vocab_size"),
        head=head,
        stored_head=head,
        tied=config.flag("tie_word_embeddings", family.defaults.tied) and head is Head.LANGUAGE,
        norm_eps=config.fraction("rms_norm_eps", family.defaults.norm_eps),
        qkv_bias=qkv_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        attention_scale=family.read_attention_scale(config, head_dim),
        activation="gelu_tanh" if "gelu_pytorch_tanh" in family.activations else "silu",
        norm_plus_one=family.norm_plus_one,
        embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
        **_experts(config, family, any(layer_type.sparse for layer_type in types.values())),
        layer_types=layer_types,
        types=types,
        max_positions=_max_positions(config, family, most, [layer_type.rope for layer_type in types.values()]),
        eos_token_ids=end_tokens(fields, folder),
        dtype=_dtype(config),
        path=str(folder),
    )
    check_unread(config, family.inert)
    return spec


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"model.path={folder} is not a folder; give the folder of a Hugging Face checkpoint.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path={folder} is an adapter; merge it into its model first, with peft's "
            "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...), and give that folder."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path={folder} has no config.json; give the folder of a Hugging Face checkpoint.")
    return _json_object(folder / "config.json")


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON or not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def _of_transformers(config: ConfigJson, fields: dict[str, Any], own_code: bool) -> ModelSpec:
    """The model of a family that `FAMILIES` does not have, or of the folder's `own_code`, as transformers reads it."""
    from aligner.models.transformers_spec import transformers_spec  # imported here: torch takes seconds

    if own_code:
        check_in_folder(config.folder, fields["auto_map"])
    elif "auto_map" in config:
        check_auto_map(config, config.get("auto_map"))
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config is there; use the model before quantization.")
    head = Head.LANGUAGE
    named = config.get("architectures")
    if named and named[0].endswith("ForSequenceClassification"):
        head = Head.SCALAR
        _check_one_score(config)
    return transformers_spec(config.folder, head, named, _dtype(config), end_tokens(fields, config.folder), own_code)


def _family(config: ConfigJson) -> tuple[str, Family | None, Head]:
    """By architecture or, if config.json has none, by model_type, as a language model; None: a family of transformers alone.

    vLLM uses the architecture, transformers model_type: they must agree.
    """
    named, model_type = config.get("architectures"), config.get("model_type")
    if named is not None and not (isinstance(named, list) and all(type(name) is str for name in named)):
        raise config.error(f"architectures={named!r} must be a list of one name.")
    if model_type is not None and type(model_type) is not str:
        raise config.error(f"model_type={model_type!r} must be a name, such as {next(iter(FAMILIES))!r}.")
    for name, family in FAMILIES.items():
        heads = {family.architecture: Head.LANGUAGE, family.classifier: Head.SCALAR}
        head = heads.get(named[0]) if named else Head.LANGUAGE if model_type == name else None
        if head is None:
            continue
        if named and len(named) > 1:
            raise config.error(f"architectures={named} names several; leave the one that the weights are of.")
        if model_type not in (name, None):
            raise config.error(
                f"model_type={model_type!r} is not that of architecture {named[0]}, which is {name!r}: transformers goes "  # type: ignore[index]
                "by the one, the engine by the other; set both to what the weights are of."
            )
        if head is Head.SCALAR:
            _check_one_score(config)
        return name, family, head
    if model_type is None or model_type in FAMILIES:
        supported = ", ".join(family.architecture for family in FAMILIES.values())
        raise config.error(
            f"architecture {named[0] if named else model_type} is not supported (model_type={model_type!r}); supported are "
            f"{supported}, and each as ...ForSequenceClassification with num_labels=1; and with engine=fsdp the language models "
            "of transformers that have another model_type."
        )
    return str(model_type), None, Head.LANGUAGE


def _check_one_score(config: ConfigJson) -> None:
    """Raises ValueError unless there is one label: transformers derives the number from `id2label`, 2 by default."""
    names = config.get("id2label") or (0, 1)
    labels = config.get("num_labels", len(names))
    if labels != 1 or (len(names) != 1 and "id2label" in config):
        raise config.error(
            f"num_labels={labels} is not supported: a critic or a reward model gives one number; "
            "use a model with num_labels=1 (one entry in id2label), or a language model, which gets a new head."
        )


def _check_supported(config: ConfigJson, family: Family) -> None:
    """Settings that would change the computation and are not implemented are refused, never ignored."""
    for key in {"attention_bias", "mlp_bias"}.difference(family.optional_biases):
        config.only(key, (False,))
    for key, allowed in family.only.items():
        config.only(key, allowed)
    config.only("hidden_act", family.activations)
    config.only("hidden_activation", (family.activations[0], None))  # as transformers 4 names Gemma's
    no_dropout = (0.0, None) if "attention_dropout" in family.nullable else (0.0,)
    config.only("attention_dropout", no_dropout, ": training here, like the engine, drops nothing out")
    config.only("output_router_logits", (False,), ": no loss here adds the router's loss of balance")


def _kv_heads(config: ConfigJson, family: Family, heads: int) -> int:
    usual = family.defaults.kv_heads
    kv_heads = config.size("num_key_value_heads", heads, null="num_key_value_heads" in family.nullable)
    if "num_key_value_heads" not in config and usual not in (None, heads):
        raise config.error(
            f"num_key_value_heads is not there, for which transformers takes {usual} and not the "
            f"num_attention_heads={heads}; set it."
        )
    if heads % kv_heads:
        raise config.error(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    return kv_heads


def _head_dim(config: ConfigJson, family: Family, hidden: int, heads: int) -> int:
    if heads > hidden:
        raise config.error(f"num_attention_heads={heads} is more than hidden_size={hidden}.")
    whole = hidden // heads
    dim = config.size("head_dim", family.defaults.head_dim or whole, null="head_dim" in family.nullable)
    if family.engine.fixed_head_dim and dim != whole:
        raise config.error(
            f"head_dim={dim} is not hidden_size / num_attention_heads={whole}, which the engine takes for this family; "
            "use a model of which it is."
        )
    if family.divided_hidden and hidden % heads:
        raise config.error(f"num_attention_heads={heads} must divide hidden_size={hidden}.")
    if dim % 2:
        raise config.error(f"head_dim={dim} is odd, and rotary positions turn pairs; use an even one.")
    return dim


def _max_positions(config: ConfigJson, family: Family, most: int, ropes: Sequence[Rope]) -> int:
    """Maximum sequence length: the least of config.json's limits and of those of the rotary embeddings, as in vLLM."""
    limits = [config.size(key, most, null=True) for key in LENGTHS]
    return family.longest(ropes, min(most, *limits))


def _dtype(config: ConfigJson) -> str:
    """`dtype`, or its older name `torch_dtype`."""
    dtype, older = config.get("dtype"), config.get("torch_dtype")
    name = "float32" if dtype is None and older is None else older if dtype is None else dtype
    if type(name) is not str or name not in ELEMENT_BYTES:
        raise config.error(f"dtype={name!r} is not supported; use {', '.join(ELEMENT_BYTES)}.")
    return str(name)


def _experts(config: ConfigJson, family: Family, sparse: bool) -> dict[str, Any]:
    """The fields of ModelSpec that describe sparse MLPs; `sparse`: some layer has one."""
    dense = {"experts": 0, "experts_per_token": 0, "expert_ffn": 0, "norm_topk": False}
    if family.experts is None:
        return dense
    keys = [key for key in family.experts.count if key in config] or [family.experts.count[0]]
    experts, chosen = config.size(keys[0]), config.size("num_experts_per_tok")
    if len({config.size(key) for key in keys}) > 1:
        raise config.error(f"{' and '.join(keys)} are two names of one thing and differ; leave one of them out.")
    if chosen > experts:
        raise config.error(f"num_experts_per_tok={chosen} is more than {keys[0]}={experts}.")
    norm_topk, width = family.experts.norm_topk, config.size(family.experts.width)
    if norm_topk is None:
        norm_topk = config.flag("norm_topk_prob")
    if not sparse:
        return dense
    return {"experts": experts, "experts_per_token": chosen, "expert_ffn": width, "norm_topk": norm_topk}


def end_tokens(config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """End tokens of config.json and generation_config.json: chat models often name their turn's end token only in the latter.

    What is no token id is left out: `aligner.data.end_tokens.special_ids` refuses it.
    """
    generation = folder / "generation_config.json"
    tokens: list[int] = []
    for source in (config, _json_object(generation) if generation.is_file() else {}):
        ids = source.get("eos_token_id")
        tokens += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(token for token in tokens if type(token) is int))
