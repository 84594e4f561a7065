"""Which models the installed vLLM has a class for, read from its source: importing vLLM would take seconds (no torch, no vLLM)."""

from __future__ import annotations

import ast
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec

_TABLES = "_VLLM_MODELS"
_OWN_PLUGINS = "vllm."


def check_known(spec: ModelSpec, tensor: int = 1) -> None:
    """Raises ValueError for a model that vLLM has no class for and that its transformers backend does not take, or not over
    `tensor` ranks.

    Says nothing where a plugin may add classes, or where vLLM's table is not read.
    """
    from aligner.models import transformers_model  # imported here: torch and transformers take seconds

    assert spec.tensors is not None, "families of the table are vLLM's own"
    architecture, known = spec.tensors.architecture, architectures()
    if known is None or architecture in known:
        return
    config = transformers_model.read_config(spec.path, spec.head, spec.trust_remote_code)
    kind = transformers_model.model_class(config, spec.head, spec.path, spec.trust_remote_code)
    reason = None
    if spec.trust_remote_code and "AutoModel" not in config.auto_map:
        reason = "auto_map in its config.json names no AutoModel, which vLLM's transformers backend would make"
    elif not (kind.is_backend_compatible() or kind._can_set_attn_implementation()):
        reason = "the class does not take its attention from transformers' AttentionInterface"
    if reason:
        raise ValueError(
            f"rollout.engine=vllm: the installed vLLM has no class for architecture {architecture} ({spec.path}), and {reason}; "
            "use rollout.engine=transformers."
        )
    if tensor > 1 and not getattr(config, "base_model_tp_plan", None):
        raise ValueError(
            f"placement.rollout.tensor={tensor}: the installed vLLM has no class for architecture {architecture} ({spec.path}), and "
            f"transformers' {kind.__name__} has no tensor-parallel plan; use 1."
        )


@cache
def architectures() -> frozenset[str] | None:
    """Names of the classes that vLLM's registry lists; None: it cannot be told without importing it."""
    plugins = entry_points(group="vllm.general_plugins")
    package = find_spec("vllm")
    if package is None or package.origin is None or any(not one.value.startswith(_OWN_PLUGINS) for one in plugins):
        return None
    try:
        registry = Path(package.origin).parent / "model_executor" / "models" / "registry.py"
        return _listed(ast.parse(registry.read_text(encoding="utf-8"))) or None
    except (OSError, SyntaxError):
        return None


def _listed(registry: ast.Module) -> frozenset[str]:
    """The keys of the dictionaries that are merged into the table of all models."""
    tables = {
        node.targets[0].id: node.value
        for node in registry.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    parts = [part.id for part in tables[_TABLES].values if isinstance(part, ast.Name)] if _TABLES in tables else []
    keys = [key for part in parts if part in tables for key in tables[part].keys]
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
