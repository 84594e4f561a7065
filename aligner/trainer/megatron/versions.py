"""Where Megatron-core 0.16 (Python 3.11) and 0.19 (3.12 and later) differ in what we call; the only file that knows of both."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec


def submodules_of(spec: Any) -> Any:
    """The specs of a module's parts: for MLPs and experts 0.16 has a `ModuleSpec`, 0.19 a builder with bound arguments."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def use_experts(mlp: Any, module: type, **params: Any) -> None:
    """Let a sparse layer's specs build its experts by `module`: 0.16 takes a `ModuleSpec`, 0.19 calls what builds them."""
    if isinstance(mlp, partial):
        submodules_of(mlp).experts = partial(module, **params)
    else:
        mlp.submodules.experts = ModuleSpec(module, params=params)
