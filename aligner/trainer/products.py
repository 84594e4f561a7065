"""Matrix products of training: oneDNN's in place of MKL's on CPUs whose AVX-512 only oneDNN uses.

torch multiplies float32 matrices on a CPU by MKL, which uses AVX-512 on Intel's processors alone: on an AMD EPYC of the
fifth generation it reaches 103 GFLOP/s a core, and oneDNN, which is part of torch too, 225. Both are float32 throughout; they
add in another order. bfloat16 goes to oneDNN anyway.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 1 << 20
"""Multiplications of a product from which on oneDNN is the faster; a call of it costs 8 us more."""


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether MKL leaves this CPU's AVX-512 unused. `ATEN_CPU_CAPABILITY=avx2`, which takes AVX-512 from torch's own kernels, also
    says no."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    information = Path("/proc/cpuinfo")
    return platform.system() == "Linux" and information.exists() and "GenuineIntel" not in information.read_text()


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """left @ right; not differentiable."""
    if (
        left_MK.dtype == torch.float32 == right_KN.dtype
        and left_MK.device.type == "cpu"
        and left_MK.numel() * right_KN.shape[1] >= SMALLEST
        and onednn_is_faster()
    ):
        left_MK, right_NK = _strided(left_MK.detach()), _strided(right_KN.detach().T)
        if _other_way_round(left_MK, len(right_NK)):
            return _onednn(right_NK, left_MK).T.contiguous()
        return _onednn(left_MK, right_NK)
    return left_MK @ right_KN


def _onednn(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """left @ right^T; the left one is copied where it does not lie row by row."""
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, None, "none", [], "")  # type: ignore[no-any-return]


def _other_way_round(left_MK: Tensor, columns: int) -> bool:
    """Whether copying the left matrix, as of the gradient of a wide layer's weight, costs more than copying the right one and turning the product."""
    rows, inner = left_MK.shape
    return left_MK.stride(1) != 1 and rows * inner > 2 * columns * (rows + inner)


def _strided(matrix: Tensor) -> Tensor:
    """As oneDNN takes it: rows or columns one after the other. Gradients may be expanded numbers."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    if (column == 1 and row >= columns) or (row == 1 and column >= rows):
        return matrix
    return matrix.contiguous()


def add_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """total += left @ right, in place."""
    by_onednn = total_MN.dtype is torch.float32 and total_MN.device.type == "cpu" and onednn_is_faster()
    if total_MN.dtype == left_MK.dtype and not by_onednn:
        total_MN.addmm_(left_MK, right_KN)  # without a copy of the product, or a rounding of it
    else:
        total_MN.add_(product(left_MK, right_KN))


def shaped(out: Tensor, *shape: int) -> Tensor:
    """The result of a function's forward in another shape, which the caller may change in place, as it may that of torch's own
    products: autograd forbids it of a view."""
    return torch.ops.aten._unsafe_view(out, shape)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.group = group
        if x.dtype is not torch.float32:  # torch adds the bias before it rounds
            return shaped(F.linear(x.reshape(-1, x.shape[-1]), weight_NK, bias_N), *x.shape[:-1], len(weight_NK))
        out = shaped(product(x.reshape(-1, x.shape[-1]), weight_NK.T), *x.shape[:-1], len(weight_NK))
        return out if bias_N is None else out.add_(bias_N)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight_NK = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_x = product(grad_MN, weight_NK).view(x.shape) if of_x else None
        sum_of_ranks = dist.all_reduce(grad_x, group=ctx.group, async_op=True) if ctx.group and of_x else None
        grad_weight_NK = product(grad_MN.T, x.reshape(-1, x.shape[-1])) if of_weight else None
        if sum_of_ranks is not None:
            sum_of_ranks.wait()
        return grad_x, grad_weight_NK, grad_MN.sum(0) if of_bias else None, None


def linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """x @ weight^T + bias by `product`, differentiable.

    Args:
        x: [..., K].
        group: tensor-parallel group, over which the gradient of x is summed while that of the weight is computed; None: it is
            not summed.
    """
    return _Linear.apply(x, weight_NK, bias_N, group)  # type: ignore[no-any-return]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_SK: Tensor, weight_EKN: Tensor, rows_E: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x_SK, weight_EKN)
        ctx.rows_E = rows_E
        out_SN = x_SK.new_zeros(len(x_SK), weight_EKN.shape[2])
        for expert, part in _parts(rows_E):
            out_SN[part] = product(x_SK[part], weight_EKN[expert])
        return out_SN

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_SK, weight_EKN = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x_SK) if of_x else None
        grad_weight = torch.zeros_like(weight_EKN) if of_weight else None
        for expert, part in _parts(ctx.rows_E):
            if grad_x is not None:
                grad_x[part] = product(grad_SN[part], weight_EKN[expert].T)
            if grad_weight is not None:
                grad_weight[expert] = product(x_SK[part].T, grad_SN[part])
        return grad_x, grad_weight, None


def _parts(rows_E: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of each expert that has rows."""
    stops = accumulate(rows_E)
    return (
        (expert, slice(stop - rows, stop))
        for expert, (rows, stop) in enumerate(zip(rows_E, stops, strict=True))
        if rows
    )


def grouped_linear(x_SK: Tensor, weight_EKN: Tensor, rows_E: tuple[int, ...]) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix by `product`; differentiable.

    Args:
        rows_E: number of each expert's rows; rows after them have no expert, and give zeros.

    Returns:
        [S, N].
    """
    return _GroupedLinear.apply(x_SK, weight_EKN, rows_E)  # type: ignore[no-any-return]
