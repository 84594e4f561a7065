"""Linear layers and experts of transformers' models by `aligner.trainer.products`, as Megatron's are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aligner.trainer.products import grouped_linear, linear


def use_products(model: nn.Module) -> int:
    """Let linear layers, also those of GPT-2 whose weight is transposed, multiply by `products.linear`, and experts that are one
    tensor by `products.grouped_linear`; parameters and names stay.

    Returns:
        How many modules do: linear layers whose class is torch's or transformers' own, and experts of classes that transformers
        can run in several ways (its `use_experts_implementation`).
    """
    changed = 0
    for module in model.modules():
        forward: Any = None
        if type(module) in (nn.Linear, Conv1D):
            forward = _Product(module, transposed=type(module) is Conv1D)
        elif hasattr(module, "_is_expert_parallel") and hasattr(module, "_apply_gate"):
            forward = _Experts(module)
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign]
            changed += 1
    return changed


class _Product:
    """In place of a linear layer's forward."""

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        self._module, self._transposed = module, transposed

    def __call__(self, input: Tensor) -> Tensor:  # as torch names it: a model may call by keyword
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return linear(input, weight.T if self._transposed else weight, self._module.bias)  # type: ignore[arg-type]


class _Experts:
    """In place of the forward of experts: each token's rows go to the experts that its router chose."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module

    def __call__(self, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """
        Args:
            expert_NK: the experts of each token.
            weight_NK: of their outputs in the token's.
        """
        experts = self._module
        expert_S, order_S = expert_NK.flatten().sort(stable=True)
        count_E = torch.bincount(expert_S, minlength=experts.num_experts)[: experts.num_experts]
        rows_E = tuple(count_E.tolist())
        x_SH = hidden_NH.index_select(0, order_S // expert_NK.shape[1])
        if experts.has_gate:
            inner = experts._apply_gate(self._linear("gate_up_proj", x_SH, expert_S, rows_E))
        else:
            inner = experts.act_fn(self._linear("up_proj", x_SH, expert_S, rows_E))
        out_SH = self._linear("down_proj", inner, expert_S, rows_E) * weight_NK.flatten()[order_S, None]
        by_token = torch.empty_like(out_SH).index_copy(0, order_S, out_SH)
        return by_token.view(*expert_NK.shape, -1).sum(1).to(hidden_NH.dtype)

    def _linear(self, name: str, x: Tensor, expert_S: Tensor, rows_E: tuple[int, ...]) -> Tensor:
        """x times the matrices of `name`, of each row's expert."""
        experts = self._module
        weight: Tensor = getattr(experts, name)
        out = grouped_linear(x.to(weight.dtype), weight if experts.is_transposed else weight.transpose(1, 2), rows_E)
        if not experts.has_bias:
            return out
        bias_EN: Tensor = getattr(experts, f"{name}_bias")
        return out + bias_EN.index_select(0, expert_S.clamp(max=len(bias_EN) - 1))
