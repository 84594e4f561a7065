"""Rotary positions as config.json asks for them, read as transformers 5 and vLLM read them (no torch)."""

from __future__ import annotations

from typing import Any

from aligner.models.config_json import ConfigJson, is_number, same

KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""rope_type -> the numbers that it needs."""
_ORIGINAL = "original_max_position_embeddings"


def read_rope(config: ConfigJson, default_theta: float, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """The base of the frequencies and their scaling.

    `rope_parameters` is how transformers 5 writes them, `rope_theta` and `rope_scaling` how versions before it did, and
    how model cards say to stretch a context. Where both are there, `rope_scaling` takes the place of all of
    `rope_parameters`. A base inside the one that counts is used before one outside.

    Args:
        max_positions: config.json's own, which "llama3" takes for the length before scaling where that is left out.

    Returns:
        (theta, None or {"rope_type": ..., its numbers}).

    Raises:
        ValueError: a kind of scaling that is not implemented, a missing or wrong number, or entries on which readers
            disagree.
    """
    found = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    for key, value in found.items():
        if value is not None and not isinstance(value, dict):
            raise config.error(f"{key}={value!r} must be an object, or null.")
    name = "rope_scaling" if found["rope_scaling"] else "rope_parameters"
    rope: dict[str, Any] = dict(found[name] or {})
    _check_keys(config, name, rope)
    kind = _kind(config, name, rope)
    outside = config.get("rope_theta", default_theta)
    theta = rope.get("rope_theta", outside)
    if not is_number(theta) or theta <= 0:
        where = f"{name}: " if "rope_theta" in rope else ""
        raise config.error(f"{where}rope_theta={theta!r} must be a positive number.")
    replaced = (found["rope_parameters"] or {}).get("rope_theta", theta)
    if not same(replaced, theta):
        raise config.error(
            f"rope_scaling takes the place of rope_parameters, whose rope_theta={replaced!r} is then lost: transformers "
            f"and the engine would run with {theta}. Write rope_theta={replaced!r} into rope_scaling too (or {theta}, if "
            "that is meant)."
        )
    for where, value in (
        (f"{name}: ", rope.get("partial_rotary_factor", 1)),
        ("", config.get("partial_rotary_factor")),
    ):
        if not (same(value, 1) or (value is None and not where)):
            raise config.error(f"{where}partial_rotary_factor={value!r} is not supported; use 1.0, or leave it out.")
    return float(theta), _scaling(config, name, kind, rope, max_positions)


def _kind(config: ConfigJson, name: str, rope: dict[str, Any]) -> str:
    """`rope_type`, or as it was called before, `type`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    older = rope.get("type", kind)
    if older != kind:
        raise config.error(f"{name} has rope_type={kind!r} and type={older!r}, which differ; leave one of them out.")
    if kind not in KINDS:
        raise config.error(
            f"{name}: rope_type={kind!r} is not supported; supported are {', '.join(map(repr, KINDS))}. Without the "
            f"entry {name} the model is as it was before its context was stretched."
        )
    return str(kind)


def _check_keys(config: ConfigJson, name: str, rope: dict[str, Any]) -> None:
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise config.error(
            f"{name} has parameters of its own for {', '.join(nested)}: rotary positions that differ between layers are "
            "not supported."
        )


def _scaling(
    config: ConfigJson, name: str, kind: str, rope: dict[str, Any], max_positions: int
) -> dict[str, Any] | None:
    if kind == "llama3":
        rope.setdefault(_ORIGINAL, max_positions)
        beside = config.get(_ORIGINAL, rope[_ORIGINAL])  # outside, transformers' configuration and the engine disagree
        if not same(beside, rope[_ORIGINAL]):
            raise config.error(
                f"{_ORIGINAL}={beside!r} beside {name} is not the {rope[_ORIGINAL]!r} of {name}; leave it out."
            )
    strange = sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *KINDS[kind]})
    if strange:
        raise config.error(
            f"{name}: {strange[0]}={rope[strange[0]]!r} has no meaning with rope_type={kind!r}; leave it out, or set the "
            "rope_type that is meant."
        )
    missing = [key for key in KINDS[kind] if not is_number(rope.get(key)) or rope[key] <= 0]
    if missing:
        raise config.error(f"{name}: rope_type {kind!r} needs a positive number for {', '.join(missing)}.")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise config.error(f"{name}: high_freq_factor must be more than low_freq_factor={rope['low_freq_factor']}.")
    return {"rope_type": kind, **{key: rope[key] for key in KINDS[kind]}} if KINDS[kind] else None
