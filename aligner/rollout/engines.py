"""The rollout engines by name: checks, layout and memory estimate without importing them, and their classes (no torch)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from aligner.reshard.plan.block_scales import QuantizedDestination
from aligner.reshard.plan.layout import UnknownLayout, WeightLayout
from aligner.rollout.config import ENGINES, RolloutConfig
from aligner.rollout.quantization import SETTING, quantized_tensors
from aligner.rollout.transformers import sizes as transformers
from aligner.rollout.vllm import sizes as vllm
from aligner.rollout.vllm.layout import EngineLayout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aligner.models.spec import ModelSpec
    from aligner.rollout.engine import RolloutEngine
    from aligner.rollout.offline import OfflineEngine
    from aligner.spmd.mesh import Mesh


class Check(Protocol):
    """Raises ValueError, naming the setting and the values that would work, if the engine cannot run a model as configured."""

    def __call__(self, spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> None: ...


class MemoryEstimate(Protocol):
    """Bytes of weights and, where that is known, KV cache on one of the role's ranks."""

    def __call__(self, spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> float: ...


@dataclass(frozen=True)
class Backend:
    """One rollout engine: its rank arithmetic and the import path of its class."""

    check: Check
    layout: Callable[[ModelSpec, Mesh, RolloutConfig], WeightLayout]
    """(model, mesh, settings) -> which region of which checkpoint tensor every rank of the mesh holds."""
    bytes_per_rank: MemoryEstimate
    fills_device: bool
    """On CUDA with kv_cache_mib=null its KV cache is what gpu_memory_utilization leaves."""
    engine: str
    """Import path of the `RolloutEngine`, imported only where an engine is built, since that takes seconds."""

    offline: str
    """Import path of the `OfflineEngine`."""

    def engine_type(self) -> type[RolloutEngine]:
        """Import the engine."""
        return cast("type[RolloutEngine]", _imported(self.engine))

    def offline_type(self) -> type[OfflineEngine]:
        """Import the engine for folders."""
        return cast("type[OfflineEngine]", _imported(self.offline))


VLLM_TOOL_PARSER = "aligner.rollout.vllm.tool_parsers.tool_parser"
"""Import path of what makes one of vLLM's parsers of tool calls."""


class ExtractCalls(Protocol):
    """(a turn's text, definitions of the tools) -> (its content, (name, arguments as JSON text) of each call)."""

    def __call__(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]]]: ...


def vllm_tool_parser(name: str, tokenizer: PreTrainedTokenizerBase) -> ExtractCalls:
    """One of vLLM's parsers of tool calls.

    Raises:
        ValueError: vLLM has none of that name, or it does not fit the tokenizer.
    """
    make = cast("Callable[[str, PreTrainedTokenizerBase], ExtractCalls]", _imported(VLLM_TOOL_PARSER))
    return make(name, tokenizer)


def _imported(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _check_vllm(spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> None:
    vllm.check_model(spec, mesh, config, cpu)
    layout = _vllm_layout(spec, mesh, config)
    if isinstance(layout, QuantizedDestination):
        layout.check()


def _vllm_layout(spec: ModelSpec, mesh: Mesh, config: RolloutConfig) -> WeightLayout:
    if spec.tensors is not None:  # nobody knows it by arithmetic: ranks exchange what the engine's loaders say
        return UnknownLayout(mesh.ranks)
    layout, quantized = EngineLayout(spec, mesh, config.dtype, mesh.expert > 1), quantized_tensors(spec, config)
    return QuantizedDestination(layout, quantized, SETTING, f"a rank of placement.{mesh.name}") if quantized else layout


def _transformers_layout(spec: ModelSpec, mesh: Mesh, config: RolloutConfig) -> WeightLayout:
    """Imported where it is asked for: torch and transformers take seconds."""
    from aligner.rollout.transformers.layout import WholeLayout

    return WholeLayout(spec, mesh, config.dtype)


BACKENDS: Mapping[str, Backend] = {
    "vllm": Backend(
        _check_vllm,
        _vllm_layout,
        vllm.bytes_per_rank,
        True,
        "aligner.rollout.vllm.engine.VllmEngine",
        "aligner.rollout.vllm.offline.VllmOffline",
    ),
    "transformers": Backend(
        transformers.check_model,
        _transformers_layout,
        transformers.bytes_per_rank,
        False,
        "aligner.rollout.transformers.engine.TransformersEngine",
        "aligner.rollout.transformers.offline.TransformersOffline",
    ),
}
"""Engines by the value of the `engine` settings."""
assert tuple(BACKENDS) == ENGINES, "aligner.rollout.config names other rollout engines"


def backend(name: str) -> Backend:
    """The engine of this name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in BACKENDS:
        raise ValueError(f"rollout.engine={name} is unknown; use {', '.join(BACKENDS)}.")
    return BACKENDS[name]
