"""From a composed configuration to a `Job`: its loop, its models, its data; every mistake is found on the way."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import hydra.utils

from aligner.check.job import check_job, check_models
from aligner.check.loop_settings import hints_of, one_line, raised_at, settings_of
from aligner.check.roles import wanted_roles
from aligner.config.as_json import config_as_json
from aligner.config.schema import Config
from aligner.data.prompts import Prompt
from aligner.data.samples import Demonstrations, Feedback, Pairs
from aligner.data.sets import read_sets
from aligner.run.input_digests import inputs_of
from aligner.run.job import Job
from aligner.run.library_warnings import ignore_library_notes
from aligner.run.resume import check_resumed
from aligner.trainer.loss_mean import takes_one_step

BATCHES = {
    "prompts": Iterable[list[Prompt]],
    "demonstrations": Iterable[Demonstrations],
    "preferences": Iterable[Pairs],
    "feedback": Iterable[Feedback],
}
"""data.kind -> how a loop annotates the batches that it iterates over."""


def prepare(config: Config, world_size: int) -> Job:
    """Find the loop, check the settings and the models, read the data, check them together.

    What is held in memory afterwards: every row of data.path and data.eval_path, tokenized.

    Raises:
        ValueError: a mistake in the configuration or the data, with the setting and what would work.
    """
    ignore_library_notes()  # before the loop's imports, Megatron among them
    config = with_task(config)
    loop = _find_loop(config.algorithm)
    settings = settings_of(loop, {k: v for k, v in config.algorithm.items() if k != "_target_"})
    if hasattr(settings, "check_job"):  # what a loop asks of the settings beside its own
        settings.check_job(config)
    _check_batches(loop, config)
    roles = wanted_roles(config, getattr(settings, "roles", ["policy", "rollout", "reward"]))
    _check_stream(config, settings, roles)
    models = check_models(config, roles, world_size)
    data = read_sets(config.data, models.tokenizer)
    checked = check_job(config, roles, models, data)
    config = replace(config, rollout=checked.rollout, models=dict(checked.models))
    job = Job(config, loop, settings, roles, checked)
    if os.environ.get("RANK", "0") != "0":
        return job
    job = replace(job, inputs=inputs_of(config, roles, checked.data))
    check_resumed(config, config_as_json(config, job.mask), job.inputs)
    return job


def _find_loop(algorithm: dict[str, Any]) -> Callable[..., Iterator[Any]]:
    target = algorithm.get("_target_")
    if not target:
        raise ValueError("algorithm._target_ has no value; use algorithm=grpo, algorithm=sft, or module.function.")
    module, _, name = str(target).rpartition(".")
    try:
        loop = getattr(importlib.import_module(module), name)
    except Exception as error:
        where = "" if isinstance(error, (ImportError, AttributeError)) else f" at {raised_at(error)}"
        raise ValueError(
            f"algorithm._target_={target} cannot be imported ({type(error).__name__}{where}: {one_line(error)}); give "
            "module.function, where the module is found from the folder the job is started in."
        ) from error
    if not callable(loop) or inspect.isclass(loop) or len(inspect.signature(loop).parameters) != 3:
        raise ValueError(f"algorithm._target_={target} must be a function of (roles, batches, cfg).")
    if inspect.iscoroutinefunction(loop) or inspect.isasyncgenfunction(loop):
        raise ValueError(
            f"algorithm._target_={target} is async; every rank runs a loop in lockstep: write def, not async def."
        )
    return loop


def _check_batches(loop: Callable[..., Any], config: Config) -> None:
    """A loop that says what it iterates over must get that."""
    name = list(inspect.signature(loop).parameters)[1]
    hint = hints_of(loop).get(name)
    wanted = [kind for kind, form in BATCHES.items() if form == hint]
    if wanted and config.data.kind not in wanted:
        raise ValueError(
            f"algorithm._target_={config.algorithm['_target_']} iterates over {wanted[0]}, but data.kind={config.data.kind}; "
            f"use data.kind={wanted[0]}."
        )


def _check_stream(config: Config, settings: Any, roles: list[str]) -> None:
    """What is sampled by other weights than it trains needs a loop that samples, and a loss that is right for that."""
    stream = config.stream
    if not stream.lag and stream.step_tokens is None:
        return
    given = (
        f"stream.lag={stream.lag}, stream.step_tokens={'null' if stream.step_tokens is None else stream.step_tokens}"
    )
    if not any(role in config.roles and config.role(role).kind.runs_on == "engine" for role in roles):
        raise ValueError(f"{given}: the loop samples nothing (algorithm.roles={roles}); use lag=0, step_tokens=null.")
    loss = getattr(settings, "loss", None)
    if loss is not None and takes_one_step(loss):
        raise ValueError(
            f"{given}: the loss is right for samples of the present weights only; use lag=0 and step_tokens=null, or "
            "algorithm=grpo_decoupled."
        )


def with_task(config: Config) -> Config:
    """`data.task` as the object that it names."""
    if config.data.task is None:
        return config
    try:
        task = hydra.utils.instantiate(config.data.task)
    except Exception as error:
        raise ValueError(f"data.task cannot be built: {one_line(error.__cause__ or error)}") from None
    return replace(config, data=replace(config.data, task=task))
