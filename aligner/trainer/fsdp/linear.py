"""Linear layers of transformers' models by `aligner.trainer.products`, as Megatron's are; experts that are one tensor stay as they are."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aligner.trainer.products import linear


def use_products(model: nn.Module) -> int:
    """Let linear layers, also those of GPT-2 whose weight is transposed, multiply by `products.linear`; parameters and names stay.

    Returns:
        How many do: those whose class is torch's or transformers' own.
    """
    changed = 0
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.forward = _Product(module, transposed=type(module) is Conv1D)  # type: ignore[method-assign]
            changed += 1
    return changed


class _Product:
    """In place of a linear layer's forward."""

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        self._module, self._transposed = module, transposed

    def __call__(self, input: Tensor) -> Tensor:  # as torch names it: a model may call by keyword
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return linear(input, weight.T if self._transposed else weight, self._module.bias)  # type: ignore[arg-type]
