"""A loop's own settings: checked against its dataclass, with the functions that they name."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import hydra.utils
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def settings_of(loop: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The loop's settings, checked against the dataclass that annotates `cfg`, or as they are where there is none.

    Raises:
        ValueError: an unknown or wrong setting, naming it and what would work.
    """
    name = list(inspect.signature(loop).parameters)[2]
    kind = hints_of(loop).get(name)
    built = {key: _built(key, value) for key, value in given.items() if isinstance(value, dict) and "_target_" in value}
    if kind is None or not is_dataclass(kind):
        return SimpleNamespace(**{"loss": None, **given, **built})
    known = [entry.name for entry in fields(kind)]
    if "loss" in built and "loss" not in known:
        del built["loss"]  # of the configuration that a loop of one's own is laid over
    try:
        plain = {key: value for key, value in given.items() if key not in built and key != "loss"}
        checked = OmegaConf.merge(OmegaConf.structured(kind), dict.fromkeys(built) | plain)
        values = OmegaConf.to_container(checked)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"algorithm: {text} (settings of {loop.__name__}: {', '.join(known)})") from None
    assert isinstance(values, dict)
    settings = kind(**{**values, **built})  # type: ignore[operator]
    _check_losses(settings)
    if hasattr(settings, "check"):
        settings.check()
    return settings


def hints_of(loop: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(loop)
    except NameError:  # names that are imported for type checkers only
        return {}


def _built(key: str, given: dict[str, Any]) -> Any:
    """What `algorithm.<key>._target_` names, with its settings bound: a function under `_partial_: true`, or an object."""
    target = given["_target_"]
    try:
        made = hydra.utils.instantiate(given)
    except Exception as error:
        cause = one_line(error.__cause__ or error)
        raise ValueError(f"algorithm.{key}._target_={target} cannot be built: {cause}") from None
    if key == "loss" and not callable(made):
        raise ValueError(
            f"algorithm.loss={given} is no function; give algorithm.loss._target_=module.function with "
            "algorithm.loss._partial_=true."
        )
    if isinstance(made, functools.partial):
        known = inspect.signature(made.func).parameters
        unknown = [name for name in made.keywords if name not in known]
        if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            raise ValueError(f"algorithm.{key}.{unknown[0]}: {target} has no such argument; it has {', '.join(known)}.")
        made = functools.partial(made.func, *made.args, **made.keywords)  # Hydra's own checks its policies at each call
    if key.endswith("loss"):
        _try_loss(key, made)
    return made


def _try_loss(key: str, loss: Callable[..., Any]) -> None:
    """Call a loss on two rows of nothing: a setting out of its range is found now, and not after the first batch."""
    parameters = inspect.signature(loss).parameters
    wanted = [name for name, p in parameters.items() if p.default is p.empty or name.endswith(("_B", "_BT"))]
    given: dict[str, Any] = {
        name: torch.zeros((2, 3) if name.endswith("_BT") else 2) for name in wanted if name.endswith(("_B", "_BT"))
    }
    plain = {"mask_BT": torch.ones(2, 3, dtype=torch.bool), "preference_B": None, "kl": 0.0}
    given |= {name: value for name, value in plain.items() if name in wanted}
    if {"advantage_B", "advantage_BT"} <= given.keys():
        del given["advantage_BT"]
    try:
        loss(given.pop(next(iter(parameters))), **given)
    except ValueError as error:
        raise ValueError(f"algorithm.{key}: {error}") from None
    except Exception:
        pass


def _check_losses(settings: Any) -> None:
    """Every loss is there, and so is the reference that it compares with."""
    for key in (entry.name for entry in fields(settings) if entry.name.endswith("loss")):
        loss = getattr(settings, key)
        if loss is None:
            raise ValueError(f"algorithm.{key} has no value; give algorithm.{key}._target_=module.function.")
        if "reference" in getattr(settings, "roles", ["reference"]):
            continue
        kl_coef = getattr(loss, "keywords", {}).get("kl_coef")
        if kl_coef:
            raise ValueError(
                f"algorithm.{key}.kl_coef={kl_coef} needs the reference; add reference to algorithm.roles, or use 0."
            )
        parameter = inspect.signature(loss).parameters.get("reference_sum_B")
        if parameter is not None and parameter.default is parameter.empty:
            raise ValueError(f"algorithm.{key} compares with the reference; add reference to algorithm.roles.")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
