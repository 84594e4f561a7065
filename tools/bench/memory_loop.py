"""Loops of the product whose role calls are watched: the bytes of the tensors that each makes, at its peak."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aligner.algorithms import dpo as dpo_loop
from aligner.algorithms import grpo as grpo_loop
from aligner.algorithms import sft as sft_loop
from aligner.algorithms.dpo import DpoConfig
from aligner.algorithms.grpo import GrpoConfig
from aligner.algorithms.sft import SftConfig
from aligner.algorithms.step import Step
from aligner.data.prompts import Prompt
from aligner.data.samples import Demonstrations, Pairs
from aligner.roles.build import Roles
from aligner.trainer import attention_mask
from tools.bench.live_tensors import peak_bytes

FOLDER = "MEMORY_BENCH"
"""Environment variable: where each rank writes what it has measured."""
CALLS = ("update", "logprobs")


def sft(roles: Roles, demonstrations: Iterable[Demonstrations], cfg: SftConfig) -> Iterator[Step]:
    """`aligner.algorithms.sft`, watched."""
    yield from watched(sft_loop.sft(roles, demonstrations, cfg), roles, cfg.roles)


def dpo(roles: Roles, pairs: Iterable[Pairs], cfg: DpoConfig) -> Iterator[Step]:
    """`aligner.algorithms.dpo`, watched."""
    yield from watched(dpo_loop.dpo(roles, pairs, cfg), roles, cfg.roles)


def grpo(roles: Roles, prompts: Iterable[list[Prompt]], cfg: GrpoConfig) -> Iterator[Step]:
    """`aligner.algorithms.grpo`, watched."""
    yield from watched(grpo_loop.grpo(roles, prompts, cfg), roles, cfg.roles)


def watched(loop: Iterator[Step], roles: Roles, names: list[str]) -> Iterator[Step]:
    """The loop, in which calls of models are measured from the second step on: the first also makes what stays."""
    peaks: dict[str, float] = {}
    models = {name: roles[name] for name in names if hasattr(roles[name], "engine_type")}
    for step, result in enumerate(loop):
        if step == 0:
            for name, role in models.items():
                for method in filter(partial(hasattr, role), CALLS):
                    setattr(role, method, _measured(getattr(role, method), f"{name}.{method}", peaks, role))
        else:  # nobody comes back after the last step
            _write(models, peaks)
        yield result


def _write(models: Mapping[str, Any], peaks: Mapping[str, float]) -> None:
    held = {
        f"{name}.{part}": tensors.bytes()
        for name, role in models.items()
        if role.member
        for part, tensors in role.engine.parts().items()
    }
    file = Path(os.environ[FOLDER]) / f"rank_{os.environ['RANK']}.json"
    file.write_text(json.dumps({"held": held, "peaks": peaks}))


def _measured(call: Callable[..., Any], name: str, peaks: dict[str, float], role: Any) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        attention_mask._mask.cache_clear()  # those of the step before would not be counted
        peak = peak_bytes(lambda: results.append(call(*args, **kwargs)), role.world.device)
        if role.member:
            peaks[name] = max(peaks.get(name, 0.0), peak)
        return results[0]

    return measured
