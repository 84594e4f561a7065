"""What the transformers engine can run, and its memory, by arithmetic (no torch, no transformers)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from aligner.models.tensors import parameter_count
from aligner.reshard.plan.region import ELEMENT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from aligner.models.spec import ModelSpec
    from aligner.rollout.config import RolloutConfig
    from aligner.spmd.mesh import Mesh

PREFILL_TOKENS = 8192
"""Tokens of prompts in one forward pass where rollout.max_batched_tokens is null."""


def check_model(spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> None:
    """Raises ValueError for parallel sizes, of which there are none, and for a model that transformers cannot make."""
    config.check_length(spec)
    for axis in ("tensor", "pipeline", "expert"):
        if getattr(mesh, axis) != 1:
            raise ValueError(
                f"placement.{mesh.name}.{axis}={getattr(mesh, axis)}: rollout.engine=transformers holds the whole model on each "
                "of its ranks; use 1, or engine=vllm."
            )
    from aligner.models import transformers_model  # imported here: torch and transformers take seconds

    trusted = spec.trust_remote_code
    model_config = transformers_model.read_config(spec.path, spec.head, trusted)
    kind = transformers_model.model_class(model_config, spec.head, spec.path, trusted)
    problem = _problem(kind, model_config) or _attends_to_later_tokens(spec)
    if problem:
        raise ValueError(
            f"rollout.engine=transformers: {kind.__name__} ({spec.path}) {problem}, which is not supported; use engine=vllm."
        )
    transformers_model.held_tensors(spec)


def _problem(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """Why rows of different lengths cannot be decoded together, with a cache that rows leave; None: they can."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    taken = inspect.signature(kind.forward).parameters
    if not kind._supports_default_dynamic_cache() or "past_key_values" not in taken:
        return "generates with a cache of its own kind"
    if "position_ids" not in taken:
        return "takes no positions of its tokens"
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # layer_types without the size that they need
        kinds = sorted({*(getattr(config, "layer_types", None) or ())})
        return f"has no cache by its config.json: layer_types {kinds}, sliding_window and the like ({error})"
    if kind._is_stateful and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return "keeps a state outside its cache"
    return None


def _attends_to_later_tokens(spec: ModelSpec) -> str | None:
    """Asked of the layers: GPT-NeoX has is_decoder=false in config.json too, and does not read it."""
    from aligner.models.transformers_model import empty_model

    model = empty_model(spec.path, spec.head, trust_remote_code=spec.trust_remote_code)
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        return "is an encoder (is_decoder=false in its config.json), which attends to later tokens"
    return None


def bytes_per_rank(spec: ModelSpec, mesh: Mesh, config: RolloutConfig, cpu: bool) -> float:
    """Weights of a rank in bytes, unless they are the policy's; the KV cache grows with what is generated."""
    if config.share_policy_weights:
        return 0.0
    return float(parameter_count(spec) * ELEMENT_BYTES[config.dtype])
