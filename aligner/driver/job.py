"""One job from checked configuration to last report: world, roles, the loop, and what is logged around it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import hydra.utils
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aligner.check import Checked, check
from aligner.config import Config


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
    config = _with_task(config)
    loop = _find_loop(config.algorithm)
    settings = _settings(loop, {k: v for k, v in config.algorithm.items() if k != "_target_"})
    roles = list(getattr(settings, "roles", ["policy", "rollout", "reward"]))
    checked = check(config, roles, world_size, int(getattr(settings, "group_size", 1)))
    return Job(config, loop, settings, roles, checked)


def _find_loop(algorithm: dict[str, Any]) -> Callable[..., Iterator[Any]]:
    target = algorithm.get("_target_")
    if not target:
        raise ValueError("algorithm._target_ has no value; use algorithm=grpo, algorithm=sft, or module.function.")
    try:
        loop = hydra.utils.get_method(target)
    except Exception as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"algorithm._target_={target} cannot be imported ({cause}); give module.function, where the module is "
            "found from the folder the job is started in."
        ) from None
    if not callable(loop) or len(inspect.signature(loop).parameters) != 3:
        raise ValueError(f"algorithm._target_={target} must be a function of (roles, batches, cfg).")
    return loop


def _settings(loop: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The loop's settings, checked against the dataclass that annotates `cfg`, or as they are where there is none."""
    name = list(inspect.signature(loop).parameters)[2]
    kind = typing.get_type_hints(loop).get(name)
    try:
        loss = hydra.utils.instantiate(given["loss"]) if given.get("loss") else None
    except Exception as error:
        raise ValueError(f"algorithm.loss cannot be built: {' '.join(str(error).split())}") from None
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


def _with_task(config: Config) -> Config:
    """`data.task` as the object that it names."""
    from dataclasses import replace

    if config.data.task is None:
        return config
    try:
        task = hydra.utils.instantiate(config.data.task)
    except Exception as error:
        inner = error.__cause__ or error
        raise ValueError(f"data.task cannot be built: {' '.join(str(inner).split())}") from None
    return replace(config, data=replace(config.data, task=task))
