"""One job from checked configuration to last report: world, roles, the loop, and what is logged around it."""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import hydra.utils
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aligner.check import Checked, check
from aligner.config import Config
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.driver.quiet import ignore_library_notes

BATCHES = {"prompts": Iterable[list[Prompt]], "demonstrations": Iterable[Samples]}
"""data.kind -> how a loop annotates the batches that it iterates over."""


@dataclass(frozen=True)
class Job:
    """Everything known before the world starts."""

    config: Config
    loop: Callable[..., Iterator[Any]]
    settings: Any
    """The loop's own settings, `cfg` in its signature."""
    roles: list[str]
    checked: Checked

    def run(self) -> None:
        """Start the world, run the loop on this rank, leave. Does not return."""
        from aligner.driver.loop import run_job
        from aligner.spmd.world import World

        world = World(self.config.timeout_seconds)
        try:
            run_job(self, world)
        except BaseException as error:
            world.fail(error)
        world.leave()


def prepare(config: Config, world_size: int) -> Job:
    """Check everything and find the loop.

    Raises:
        ValueError: a mistake in the configuration or the data, with the setting and what would work.
    """
    ignore_library_notes()  # before the loop's imports, Megatron among them
    config = _with_task(config)
    loop = _find_loop(config.algorithm)
    settings = _settings(loop, {k: v for k, v in config.algorithm.items() if k != "_target_"})
    _check_batches(loop, config)
    if hasattr(settings, "check"):
        settings.check()
    roles = list(getattr(settings, "roles", ["policy", "rollout", "reward"]))
    checked = check(config, roles, world_size)
    return Job(config, loop, settings, roles, checked)


def _find_loop(algorithm: dict[str, Any]) -> Callable[..., Iterator[Any]]:
    target = algorithm.get("_target_")
    if not target:
        raise ValueError("algorithm._target_ has no value; use algorithm=grpo, algorithm=sft, or module.function.")
    module, _, name = str(target).rpartition(".")
    try:
        loop = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(
            f"algorithm._target_={target} cannot be imported ({type(error).__name__}: {_one_line(error)}); give "
            "module.function, where the module is found from the folder the job is started in."
        ) from None
    if not callable(loop) or len(inspect.signature(loop).parameters) != 3:
        raise ValueError(f"algorithm._target_={target} must be a function of (roles, batches, cfg).")
    return loop


def _settings(loop: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The loop's settings, checked against the dataclass that annotates `cfg`, or as they are where there is none."""
    name = list(inspect.signature(loop).parameters)[2]
    kind = _hints(loop).get(name)
    loss = _loss(given["loss"]) if given.get("loss") else None
    if kind is None or not is_dataclass(kind):
        return SimpleNamespace(**{**given, "loss": loss})
    try:
        checked = OmegaConf.merge(OmegaConf.structured(kind), {k: v for k, v in given.items() if k != "loss"})
        values = OmegaConf.to_container(checked)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise ValueError(
            f"algorithm: {text} (settings of {loop.__name__}: {', '.join(kind.__annotations__)})"
        ) from None
    assert isinstance(values, dict)
    return kind(**{**values, **({"loss": loss} if "loss" in values else {})})  # type: ignore[operator]


def _hints(loop: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(loop)
    except NameError:  # names that are imported for type checkers only
        return {}


def _loss(given: Any) -> Callable[..., Any]:
    """The loss function with its settings bound."""
    target = given.get("_target_") if isinstance(given, dict) else given
    try:
        loss = hydra.utils.instantiate(given)
    except Exception as error:
        cause = _one_line(error.__cause__ or error)
        raise ValueError(f"algorithm.loss._target_={target} cannot be built: {cause}") from None
    if not callable(loss):
        raise ValueError(
            f"algorithm.loss={given} is no function; give algorithm.loss._target_=module.function with "
            "algorithm.loss._partial_=true."
        )
    if isinstance(loss, functools.partial):
        known = inspect.signature(loss.func).parameters
        unknown = [key for key in loss.keywords if key not in known]
        if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            raise ValueError(f"algorithm.loss.{unknown[0]}: {target} has no such argument; it has {', '.join(known)}.")
    return loss


def _check_batches(loop: Callable[..., Any], config: Config) -> None:
    """A loop that says what it iterates over must get that."""
    name = list(inspect.signature(loop).parameters)[1]
    hint = _hints(loop).get(name)
    wanted = [kind for kind, form in BATCHES.items() if form == hint]
    if wanted and config.data.kind not in wanted:
        raise ValueError(
            f"algorithm._target_={config.algorithm['_target_']} iterates over {wanted[0]}, but data.kind={config.data.kind}; "
            f"use data.kind={wanted[0]}."
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _with_task(config: Config) -> Config:
    """`data.task` as the object that it names."""
    from dataclasses import replace

    if config.data.task is None:
        return config
    try:
        task = hydra.utils.instantiate(config.data.task)
    except Exception as error:
        raise ValueError(f"data.task cannot be built: {_one_line(error.__cause__ or error)}") from None
    return replace(config, data=replace(config.data, task=task))
