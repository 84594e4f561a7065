"""Where Megatron-core 0.16 (Python 3.11) and 0.19 (3.12 and later) differ in what we call; the only file that knows of both."""

from __future__ import annotations

from functools import partial
from typing import Any


def submodules_of(spec: Any) -> Any:
    """The specs of a module's parts: for MLPs and experts 0.16 has a `ModuleSpec`, 0.19 a builder with bound arguments."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
