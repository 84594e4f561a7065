"""Rotary positions as config.json asks for them, read as transformers 5 and vLLM read them (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aligner.models.config_json import ConfigJson, is_number, same

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeType:
    """The parameters of one rope_type."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


ROPE_TYPES: Mapping[str, RopeType] = {
    "default": RopeType(),
    "linear": RopeType(("factor",)),
    "dynamic": RopeType(("factor",)),
    "llama3": RopeType(("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    "yarn": RopeType(
        ("factor", ORIGINAL), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": RopeType(("short_factor", "long_factor", ORIGINAL), ("attention_factor", "factor")),
}
"""By rope_type; the names are transformers'."""
_NULL_IS_ABSENT = ("attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one layer type (Su et al. 2021) and how they are scaled to a longer context."""

    rope_type: str = "default"
    """Key of `ROPE_TYPES`."""
    theta: float = 10000.0
    """Base of the frequencies."""
    partial_rotary_factor: float = 1.0
    """Share of each head's dimensions that is rotated, the first ones; the others carry no position."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Those of `ROPE_TYPES[rope_type]` that config.json gives, by their names there."""
    attention_factor: float = 1.0
    """Factor on the cosines and sines, so that scores are multiplied by its square (of "yarn" and "longrope")."""

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def longest(self, max_positions: int) -> int:
        """The longest sequence, in tokens, that transformers and the engine both compute with this one table.

        "linear" divides positions, so there are more. Beyond config.json's positions "dynamic" has other frequencies
        for every length in transformers, and no table in the engine. "yarn" ends where the engine's table does,
        "longrope" where transformers would change to `long_factor`.

        Args:
            max_positions: config.json's max_position_embeddings.
        """
        match self.rope_type:
            case "linear":
                return int(max_positions * self.parameters["factor"])
            case "yarn":
                return min(max_positions, int(self.parameters[ORIGINAL] * self.parameters["factor"]))
            case "longrope":
                return min(max_positions, int(self.parameters[ORIGINAL]))
        return max_positions

    @property
    def limit_reason(self) -> str:
        """Why longer sequences are refused; empty where config.json's own positions say it."""
        return {
            "dynamic": "rope_type='dynamic': beyond them transformers' frequencies change with the longest sequence of a "
            "batch, and the engine has none",
            "longrope": "rope_type='longrope': beyond original_max_position_embeddings transformers uses long_factor, and "
            "an engine of that length uses it for short sequences too",
        }.get(self.rope_type, "")


@dataclass(frozen=True)
class RopeDefaults:
    """What a family's classes take where config.json is silent, and what they can compute."""

    theta: float = 10000.0
    max_positions: int = 2048
    """config.json's max_position_embeddings, which "llama3", "yarn" and "longrope" take for the length before scaling."""
    head_dim: int = 128
    kinds: tuple[str, ...] = tuple(ROPE_TYPES)
    """The rope_types that both readers have for the family."""
    partial: bool = False
    """The family can rotate a part of each head."""
    original: int | None = None
    """original_max_position_embeddings of the family's class, which counts before the one of the entry; None: it has none."""
    null_head_dim: bool = False
    """head_dim is null for transformers, whose "dynamic", "yarn" and "longrope" then fail."""


def read_rope(config: ConfigJson, defaults: RopeDefaults) -> Rope:
    """The rotary positions of all layers.

    `rope_parameters` is how transformers 5 writes them, `rope_theta` and `rope_scaling` how versions before it did, and
    how model cards say to stretch a context. Where both are there, `rope_scaling` takes the place of all of
    `rope_parameters`. A base inside the one that counts is used before one outside.

    Raises:
        ValueError: a kind of scaling that is not implemented, a missing or wrong number, or entries on which readers
            disagree.
    """
    entries = {key: _object(config, key) for key in ("rope_parameters", "rope_scaling")}
    name = "rope_scaling" if entries["rope_scaling"] else "rope_parameters"
    entry = dict(entries[name] or {})
    nested = [key for key, value in entry.items() if isinstance(value, dict)]
    if nested:
        raise config.error(
            f"{name} has parameters of its own for {', '.join(nested)}: rotary positions that differ between layers are "
            "not supported for this family."
        )
    entry.setdefault("rope_theta", config.get("rope_theta", defaults.theta))
    theta_name = f"{name}: rope_theta" if "rope_theta" in (entries[name] or {}) else "rope_theta"
    rope = _read_entry(config, name, entry, defaults, theta_name)
    replaced = (entries["rope_parameters"] or {}).get("rope_theta", rope.theta)
    if not same(replaced, rope.theta):
        raise config.error(
            f"rope_scaling takes the place of rope_parameters, whose rope_theta={replaced!r} is then lost: transformers "
            f"and the engine would run with {rope.theta}. Write rope_theta={replaced!r} into rope_scaling too (or "
            f"{rope.theta}, if that is meant)."
        )
    return rope


def read_rope_by_layer_type(
    config: ConfigJson, defaults: RopeDefaults, thetas: Mapping[str, tuple[str, float]], scaled: str
) -> dict[str, Rope]:
    """Rotary positions that differ between layer types (Gemma 3's).

    `rope_parameters` has an object for each layer type. Files of transformers 4 have each type's base in a field of its
    own, and in `rope_scaling` the scaling of one type alone.

    Args:
        thetas: layer type -> (the field of its base in files of transformers 4, its base where neither is there).
        scaled: the layer type that rope_scaling is of.

    Raises:
        ValueError: as `read_rope`.
    """
    given, scaling = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    strange = sorted(set(given or {}) - set(thetas))
    if strange:
        raise config.error(
            f"rope_parameters: {strange[0]} is no layer type of this family; give one object for each of "
            f"{', '.join(thetas)}."
        )
    ropes = {}
    for layer_type, (old_name, theta) in thetas.items():
        entry = (given or {}).get(layer_type)
        if entry is not None and not isinstance(entry, dict):
            raise config.error(f"rope_parameters: {layer_type}={entry!r} must be an object, or null.")
        entry, name = dict(entry or {}), f"rope_parameters.{layer_type}"
        outside = config.get(old_name, theta)
        if old_name in config and "rope_theta" in entry and not same(outside, entry["rope_theta"]):
            raise config.error(
                f"{old_name}={outside!r} is not the rope_theta={entry['rope_theta']!r} of {name}, which is used; leave "
                f"{old_name} out."
            )
        if layer_type == scaled and scaling:
            if given is not None:
                raise config.error(
                    f"rope_scaling beside rope_parameters: write what it says into {name}, and leave it out."
                )
            entry, name = dict(scaling), "rope_scaling"
        theta_name = f"{name}: rope_theta" if "rope_theta" in entry else old_name
        entry.setdefault("rope_theta", outside)
        ropes[layer_type] = _read_entry(config, name, entry, defaults, theta_name, by_layer_type=True)
    return ropes


def _object(config: ConfigJson, key: str) -> dict[str, Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise config.error(f"{key}={value!r} must be an object, or null.")
    return value


def _read_entry(
    config: ConfigJson,
    name: str,
    entry: dict[str, Any],
    defaults: RopeDefaults,
    theta_name: str,
    by_layer_type: bool = False,
) -> Rope:
    """One object of parameters, which has its rope_theta by now.

    Args:
        theta_name: where config.json has it.
        by_layer_type: it is that of one layer type.
    """
    kind = _kind(config, name, entry, defaults.kinds)
    theta = entry["rope_theta"]
    if not is_number(theta) or theta <= 0:
        raise config.error(f"{theta_name}={theta!r} must be a positive number.")
    fraction = _partial(config, name, entry, defaults)
    dim = int(defaults.head_dim * fraction)
    parameters = _parameters(config, name, kind, entry, defaults)
    if kind in ("dynamic", "yarn", "longrope") and defaults.null_head_dim and config.get("head_dim") is None:
        raise config.error(
            f"{name}: rope_type={kind!r} without head_dim, which transformers then fails on; add "
            f"head_dim={defaults.head_dim} to config.json."
        )
    match kind:
        case "linear":
            _check_linear(config, name, parameters)
        case "dynamic":
            _check_dynamic(config, name, dim)
        case "llama3":
            _check_llama3(config, name, parameters)
        case "yarn":
            _check_yarn(config, name, parameters, float(theta), by_layer_type)
        case "longrope":
            _check_longrope(config, name, parameters, dim, defaults.max_positions)
    return Rope(kind, float(theta), float(fraction), parameters, _attention_factor(kind, parameters, defaults))


def _kind(config: ConfigJson, name: str, entry: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    """`rope_type`, or as it was called before, `type`."""
    kind = entry.get("rope_type", entry.get("type", "default"))
    older = entry.get("type", kind)
    if older != kind:
        raise config.error(f"{name} has rope_type={kind!r} and type={older!r}, which differ; leave one of them out.")
    if kind not in kinds:
        raise config.error(
            f"{name}: rope_type={kind!r} is not supported; supported are {', '.join(map(repr, kinds))}. Without the "
            f"entry {name} the model is as it was before its context was stretched."
        )
    return str(kind)


def _partial(config: ConfigJson, name: str, entry: Mapping[str, Any], defaults: RopeDefaults) -> float:
    """The share of a head that is rotated: `partial_rotary_factor` of the entry, or else the one beside it."""
    inside, beside = entry.get("partial_rotary_factor", 1), config.get("partial_rotary_factor")
    values = [(f"{name}: ", inside), *([("", beside)] if beside is not None else [])]
    for where, value in values:
        if not defaults.partial and not same(value, 1):
            raise config.error(f"{where}partial_rotary_factor={value!r} is not supported; use 1.0, or leave it out.")
        dim = int(defaults.head_dim * value) if is_number(value) else 0
        if not is_number(value) or not 0 < value <= 1 or dim < 2 or dim % 2:
            raise config.error(
                f"{where}partial_rotary_factor={value!r} must be a number above 0 and at most 1 that makes an even part of "
                f"head_dim={defaults.head_dim}."
            )
    if beside is not None and "partial_rotary_factor" in entry and not same(inside, beside):
        raise config.error(
            f"partial_rotary_factor={beside!r} is not the {inside!r} of {name}, which is used; leave it out."
        )
    return float(inside if beside is None else beside)


def _parameters(
    config: ConfigJson, name: str, kind: str, entry: dict[str, Any], defaults: RopeDefaults
) -> dict[str, Any]:
    """The numbers of `kind`; none of another, and none missing."""
    allowed = ROPE_TYPES[kind]
    if ORIGINAL in allowed.required:
        beside = config.get(ORIGINAL, defaults.original)
        entry.setdefault(ORIGINAL, defaults.max_positions if defaults.original is None else beside)
        if beside is not None and not same(beside, entry[ORIGINAL]):
            # outside, transformers' configuration and the engine disagree
            raise config.error(
                f"{ORIGINAL}={beside!r} beside {name} is not the {entry[ORIGINAL]!r} of {name}; "
                + ("leave it out." if defaults.original is None else "set both to one.")
            )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *allowed.required, *allowed.optional}
    strange = sorted(set(entry) - known)
    if strange:
        raise config.error(
            f"{name}: {strange[0]}={entry[strange[0]]!r} has no meaning with rope_type={kind!r}; leave it out, or set the "
            "rope_type that is meant."
        )
    numbers = [key for key in allowed.required if not key.endswith(("short_factor", "long_factor"))]
    missing = [key for key in numbers if not is_number(entry.get(key)) or entry[key] <= 0]
    if missing:
        raise config.error(f"{name}: rope_type {kind!r} needs a positive number for {', '.join(missing)}.")
    given = {key: entry[key] for key in (*allowed.required, *allowed.optional) if key in entry}
    return {key: value for key, value in given.items() if not (value is None and key in _NULL_IS_ABSENT)}


def _check_linear(config: ConfigJson, name: str, parameters: Mapping[str, Any]) -> None:
    if type(parameters["factor"]) is int:  # it would iterate over it
        raise config.error(
            f"{name}: factor={parameters['factor']} of rope_type 'linear' fails in the engine where it is a whole number; "
            f"write {float(parameters['factor'])}."
        )


def _check_dynamic(config: ConfigJson, name: str, dim: int) -> None:
    if dim <= 2:  # the base is raised to dim / (dim - 2)
        raise config.error(f"{name}: rope_type 'dynamic' needs more than {dim} rotary dimensions a head.")


def _check_llama3(config: ConfigJson, name: str, parameters: Mapping[str, Any]) -> None:
    if parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise config.error(
            f"{name}: high_freq_factor must be more than low_freq_factor={parameters['low_freq_factor']}."
        )


def _check_yarn(
    config: ConfigJson, name: str, parameters: Mapping[str, Any], theta: float, by_layer_type: bool
) -> None:
    for key in ("attention_factor", "beta_fast", "beta_slow"):
        value = parameters.get(key, 1)
        if not is_number(value) or value <= 0:
            raise config.error(f"{name}: {key}={value!r} must be a positive number; leave it out for the usual one.")
    for key in ("mscale", "mscale_all_dim"):
        value = parameters.get(key, 1)
        if not is_number(value) or value < 0:
            raise config.error(f"{name}: {key}={value!r} must be a number of at least 0.")
    fast, slow = parameters.get("beta_fast", 32), parameters.get("beta_slow", 1)
    if fast < slow:
        raise config.error(f"{name}: beta_fast={fast} must not be less than beta_slow={slow}.")
    truncate = parameters.get("truncate", True)
    if type(truncate) is not bool:
        raise config.error(f"{name}: truncate={truncate!r} is neither true nor false.")
    if by_layer_type and not truncate:  # transformers looks for it beside the layer types
        raise config.error(f"{name}: truncate=false is ignored by transformers where layer types differ; leave it out.")
    if theta <= 1:
        raise config.error(f"{name}: rope_type 'yarn' needs a rope_theta above 1, found {theta}.")


def _check_longrope(config: ConfigJson, name: str, parameters: Mapping[str, Any], dim: int, most: int) -> None:
    for key in ("short_factor", "long_factor"):
        value = parameters.get(key)
        if not isinstance(value, list) or not all(is_number(one) and one > 0 for one in value):
            raise config.error(f"{name}: {key}={value!r} must be a list of positive numbers.")
        if len(value) != dim // 2:
            raise config.error(
                f"{name}: {key} has {len(value)} numbers; it needs {dim // 2}, one for each pair of rotary dimensions."
            )
    if parameters[ORIGINAL] <= 1:
        raise config.error(f"{name}: {ORIGINAL}={parameters[ORIGINAL]} must be more than 1.")
    ratio = most / parameters[ORIGINAL]
    for key, value in (("factor", ratio), ("attention_factor", _longrope_factor(ratio, parameters[ORIGINAL]))):
        given = parameters.get(key, value)
        if not is_number(given) or not math.isclose(given, value, rel_tol=1e-6):
            raise config.error(
                f"{name}: {key}={given!r} is not the {value} that follows from max_position_embeddings={most} and "
                f"{ORIGINAL}={parameters[ORIGINAL]}, which the engine uses; leave it out."
            )


def _attention_factor(kind: str, parameters: Mapping[str, Any], defaults: RopeDefaults) -> float:
    if kind == "longrope":
        given = parameters.get("attention_factor")
        ratio = parameters.get("factor", defaults.max_positions / parameters[ORIGINAL])
        return float(_longrope_factor(ratio, parameters[ORIGINAL]) if given is None else given)
    if kind != "yarn":
        return 1.0
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    factor, one, other = parameters["factor"], parameters.get("mscale"), parameters.get("mscale_all_dim")
    if one and other:
        return _yarn_factor(factor, one) / _yarn_factor(factor, other)
    return _yarn_factor(factor, 1.0)


def _yarn_factor(factor: float, mscale: float) -> float:
    """Peng et al. 2023, equation 22, with a weight on the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope_factor(ratio: float, original: float) -> float:
    """Ding et al. 2024: the growth of the context, on a logarithmic scale."""
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
