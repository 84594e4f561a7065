"""A loop's own settings: checked against its dataclass, with the functions that they name."""

from __future__ import annotations

import functools
import inspect
import traceback
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra.utils
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from aligner.bounds import check_settings
from aligner.trainer.loss_mean import attribute_of, rows_together


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
    check_settings(settings, "algorithm")
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
        raise ValueError(f"algorithm.{key}._target_={target} cannot be built: {cause}") from error
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


ALIGNER = Path(__file__).resolve().parents[1]
TRIAL_ROWS, TRIAL_TOKENS = 2, 3
PLAIN = {"kl": 0.0}
"""Values of the losses' parameters that are no tensors, for a trial."""
ALTERNATIVES = ("preference_B", "advantage_BT")
"""Parameters that stand in for others; a trial leaves them out where it may."""


def _try_loss(key: str, loss: Callable[..., Any]) -> None:
    """Call a loss on a few rows of three tokens: what it raises is found now, and not after the first batch.

    Not tried: a loss that needs what only its loop knows (a parameter that is no tensor [B] or [B, T] by its name), and
    one whose function has the attribute `tried` = False.

    Raises:
        ValueError: whatever it raises, or a result that is no (loss, metrics) with a gradient.
    """
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(loss).parameters.values() if p.kind not in variadic]
    needed = {p.name for p in parameters if p.default is p.empty}
    shaped = [p.name for p in parameters if p.name.endswith(("_B", "_BT"))]
    known = (
        bool(needed) and parameters[0].name in needed and parameters[0].name in shaped and needed <= {*shaped, *PLAIN}
    )
    if not known or not attribute_of(loss, "tried", True):
        return
    rows = TRIAL_ROWS * rows_together(loss)
    given: dict[str, Any] = {name: value for name, value in PLAIN.items() if name in needed}
    for name in (name for name in shaped if name in needed or name not in ALTERNATIVES):
        size = (rows, TRIAL_TOKENS) if name.endswith("_BT") else (rows,)
        given[name] = torch.ones(size, dtype=torch.bool) if name == "mask_BT" else torch.full(size, -0.5)
    if "advantage_BT" in needed:
        given.pop("advantage_B", None)
    first = given.pop(shaped[0]).requires_grad_()
    try:
        result = loss(first, **given)
    except Exception as error:
        if isinstance(error, ValueError) and _raised_by_aligner(error):  # a setting that one of our losses refuses
            raise ValueError(f"algorithm.{key}: {error}") from error
        raise ValueError(
            f"algorithm.{key}, tried on {rows} rows of {TRIAL_TOKENS} tokens, raised {type(error).__name__} at "
            f"{raised_at(error)}: {one_line(error)} (a loss that runs in a job only, on a GPU for example, is not tried if "
            "its function has the attribute tried = False)."
        ) from error
    _check_result(key, result, first)


def _check_result(key: str, result: Any, first: Tensor) -> None:
    """What an update takes from a loss."""
    wanted = "it must return (loss, metrics): a tensor [B, T] per token or [B] per row, not reduced, and {name: tensor}"
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], Tensor)
        and isinstance(result[1], Mapping)
    ):
        parts = (
            ", ".join(type(part).__name__ for part in result) if isinstance(result, tuple) else type(result).__name__
        )
        raise ValueError(f"algorithm.{key} returned {parts}; {wanted}.")
    loss, metrics = result
    shapes = (tuple(first.shape), tuple(first.shape[:1]))
    for name, value in [("the loss", loss), *metrics.items()]:
        if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
            given = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"algorithm.{key}: {name} is {given} for {list(first.shape)} inputs; {wanted}.")
    if not loss.requires_grad:
        raise ValueError(f"algorithm.{key}: the loss has no gradient, so nothing would be learned (was it detached?).")


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


def raised_at(error: BaseException) -> str:
    """`file:line` of the statement that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _raised_by_aligner(error: BaseException) -> bool:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(ALIGNER)


def one_line(error: BaseException) -> str:
    """Its message without line breaks."""
    return " ".join(str(error).split())
