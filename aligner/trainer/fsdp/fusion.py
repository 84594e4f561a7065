"""Norms and gated MLPs of transformers' models by `aligner.trainer.fused`: fewer passes over memory, fewer kept activations.

What a module computes is observed, not taken from its name: its class's own forward is run on a small copy of it with random
weights and inputs of very different sizes, and compared. A module that computes anything else stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aligner.trainer.fused import gated, gated_pair, rms_norm, rms_norm_plus_one

WIDTH = 8
"""Of the small copies."""
SCALES = (1e-3, 1.0, 1e3)
"""Of the inputs: a clamp acts on large ones alone, and where an epsilon is added shows in small ones."""
ACTIVATIONS = ("silu", "gelu_tanh")
Forward = Callable[[nn.Module, Tensor], Tensor]
"""(module, its input) -> its output."""


def fuse(model: nn.Module) -> list[str]:
    """Let the modules whose computation has a fused function use it; their parameters and names stay.

    Returns:
        Paths of the modules.
    """
    known: dict[Any, Forward | None] = {}
    fused = []
    for path, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        if kind not in known:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                known[kind] = next((each for each in _candidates(module) if _computes(module, each)), None)
        forward = known[kind]
        if forward is not None:
            module.forward = _Fused(module, forward)  # type: ignore[method-assign]
            fused.append(path)
    return fused


class _Fused:
    """In place of a module's forward."""

    def __init__(self, module: nn.Module, fused: Forward) -> None:
        self._module, self._fused = module, fused

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # a gate, for example, that the norm multiplies by
            return type(self._module).forward(self._module, x, *args, **kwargs)
        return self._fused(self._module, x)


def _kind(module: nn.Module) -> Any:
    """What modules that compute the same have in common; None: neither a norm nor a gated MLP."""
    children = dict(module.named_children())
    if not children and [*module._parameters] == ["weight"] and not module._buffers and _epsilon(module) is not None:
        weight = module._parameters["weight"]  # None of a norm without a scale
        return _class_and_settings(module) if weight is not None and weight.dim() == 1 else None
    linears = {name for name, child in children.items() if type(child) is nn.Linear}
    others = [child for name, child in children.items() if name not in linears]
    if "down_proj" in linears and linears - {"down_proj"} in ({"gate_proj", "up_proj"}, {"gate_up_proj"}):
        plain = len(others) == 1 and not module._parameters and not module._buffers
        return tuple(map(_class_and_settings, (module, *others))) if plain else None
    return None


def _class_and_settings(module: nn.Module) -> Any:
    """Layers of one class may differ by what their constructor noted: an epsilon, a clamp's limit, a share of zeros."""
    noted = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    return type(module), tuple(sorted(noted.items()))


def _epsilon(module: nn.Module) -> float | None:
    value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return value if isinstance(value, float) else None


def _candidates(module: nn.Module) -> list[Forward]:
    if hasattr(module, "down_proj"):
        return [_mlp(name, hasattr(module, "gate_up_proj")) for name in ACTIVATIONS]
    return [_norm(rms_norm), _norm(rms_norm_plus_one)]


def _norm(function: Callable[[Tensor, Tensor, float], Tensor]) -> Forward:
    def forward(module: Any, x: Tensor) -> Tensor:
        return function(x, module.weight, _epsilon(module) or 0.0)

    return forward


def _mlp(activation: str, together: bool) -> Forward:
    def forward(module: Any, x: Tensor) -> Tensor:
        if together:
            return module.down_proj(gated(module.gate_up_proj(x), activation))  # type: ignore[no-any-return]
        return module.down_proj(gated_pair(module.gate_proj(x), module.up_proj(x), activation))  # type: ignore[no-any-return]

    return forward


def _computes(module: nn.Module, candidate: Forward) -> bool:
    """Whether the class's own forward is `candidate`, on a small copy of the module."""
    small, probe = _small(module), torch.randn(3, 5, WIDTH)
    for x in (scale * probe for scale in SCALES):
        try:
            expected = type(module).forward(small, x)
        except Exception:  # it takes more than one input
            return False
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            return False
        if not torch.allclose(candidate(small, x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())):
            return False
    return True


def _small(module: nn.Module) -> nn.Module:
    """The module with a width of `WIDTH` and random float32 weights; the module itself is left alone."""
    small = copy.copy(module)
    small._parameters, small._modules = dict(module._parameters), dict(module._modules)
    if "weight" in small._parameters:
        small._parameters["weight"] = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            inputs = 2 * WIDTH if name == "down_proj" else WIDTH
            outputs = WIDTH if name == "down_proj" else 4 * WIDTH if name == "gate_up_proj" else 2 * WIDTH
            small._modules[name] = nn.Linear(inputs, outputs, bias=child.bias is not None)
    return small
