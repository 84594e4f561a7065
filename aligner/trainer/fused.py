"""The elementwise parts of a layer as autograd functions of few passes over memory: RMS norm, gated activation, rotary positions.

Written as torch expressions, each makes several tensors as large as the activations, forward and backward, and keeps some of
them. Here a result is written where it is wanted; on a CPU it is made some rows at a time, so that what is between stays in the
cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from aligner.trainer.products import shaped

CACHED = 1 << 18
"""Elements of one tensor that a CPU works on at a time (float32: 1 MiB)."""


def _parts(x_NX: Tensor) -> Iterator[slice]:
    """Rows to work on at a time: on CUDA, whose kernels cost more to start than memory to write, all of them."""
    rows = len(x_NX)
    step = max(1, CACHED // max(1, x_NX.shape[1])) if x_NX.device.type == "cpu" else max(1, rows)
    return (slice(at, at + step) for at in range(0, rows, step))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x_NH = x.reshape(-1, x.shape[-1])
        exact = torch.promote_types(x.dtype, torch.float32)
        out, scale_N1 = torch.empty_like(x_NH), x_NH.new_empty(len(x_NH), 1, dtype=exact)
        weight = weight_H.to(exact)
        for part in _parts(x_NH):
            rows = x_NH[part].to(exact)
            square = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
            torch.rsqrt(square.div_(rows.shape[1]).add_(eps), out=scale_N1[part])
            torch.mul(rows * scale_N1[part], weight, out=out[part])
        ctx.save_for_backward(x_NH, weight_H, scale_N1)
        return shaped(out, *x.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x_NH, weight_H, scale_N1 = ctx.saved_tensors
        grad_NH = grad.reshape(x_NH.shape)
        grad_x, weight = torch.empty_like(x_NH), weight_H.to(scale_N1.dtype)
        grad_weight = torch.zeros_like(weight)
        for part in _parts(x_NH):
            given, scale = grad_NH[part].to(scale_N1.dtype), scale_N1[part]
            normed = x_NH[part] * scale
            grad_weight += torch.mul(given, normed).sum(0)
            given = given * weight
            mean = torch.mul(given, normed).mean(-1, keepdim=True)
            torch.mul(given.addcmul_(normed, mean, value=-1), scale, out=grad_x[part])
        return grad_x.view(grad.shape), grad_weight.to(weight_H.dtype), None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019), in float32 at least. CUDA has a kernel of
    its own. Heads beside others of a projection are copied, or the backward would keep all of it for them."""
    x = x.contiguous()
    if x.device.type == "cuda":
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    return _RMSNorm.apply(x, weight_H, eps)  # type: ignore[no-any-return]


def rms_norm_plus_one(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Gemma's RMS norm: multiplies by 1 + weight in float32. bfloat16 holds a weight of 0.003, not 1.003."""
    return rms_norm(x.float(), 1.0 + weight_H.float(), eps).type_as(x)


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for part in _parts(gate):
        torch.mul(_activate(gate[part], activation), up[part], out=out[part])
    return out


def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str
) -> None:
    aten = torch.ops.aten
    for part in _parts(gate):
        given, inner = grad[part], grad[part] * up[part]
        if activation == "silu":
            aten.silu_backward.grad_input(inner, gate[part], grad_input=grad_gate[part])
        else:
            aten.gelu_backward.grad_input(inner, gate[part], approximate="tanh", grad_input=grad_gate[part])
        torch.mul(given, _activate(gate[part], activation), out=grad_up[part])


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: str) -> Tensor:  # type: ignore[override]
        both_NF2 = both.reshape(-1, both.shape[-1])
        gate, up = both_NF2.chunk(2, -1)
        out = _gated(gate, up, activation)
        ctx.save_for_backward(both_NF2)
        ctx.activation = activation
        return shaped(out, *both.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (both_NF2,) = ctx.saved_tensors
        grad_NF, grad_both = grad.reshape(-1, grad.shape[-1]), torch.empty_like(both_NF2)
        (gate, up), (grad_gate, grad_up) = both_NF2.chunk(2, -1), grad_both.chunk(2, -1)
        _gated_backward(grad_NF, gate, up, grad_gate, grad_up, ctx.activation)
        return grad_both.view(*grad.shape[:-1], grad_both.shape[-1]), None


class _GatedPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:  # type: ignore[override]
        gate_NF, up_NF = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.activation = activation
        return shaped(_gated(gate_NF, up_NF, activation), *gate.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gate_NF, up_NF = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate_NF), torch.empty_like(up_NF)
        _gated_backward(grad.reshape(gate_NF.shape), gate_NF, up_NF, grad_gate, grad_up, ctx.activation)
        return grad_gate.view(grad.shape), grad_up.view(grad.shape), None


def gated(both: Tensor, activation: str) -> Tensor:
    """[..., gate then up] -> activation(gate) * up (Shazeer 2020), of half the width.

    Args:
        activation: silu or gelu_tanh.
    """
    return _Gated.apply(both, activation)  # type: ignore[no-any-return]


def gated_pair(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`gated` of a gate and an up projection that are tensors of their own."""
    return _GatedPair.apply(gate, up, activation)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _rotated(x_TND, cos_T1D, sin_T1D, 1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotated(grad_TND, cos_T1D, sin_T1D, -1), None, None


def _rotated(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: int) -> Tensor:
    turned = cos_T1D.shape[-1]
    out = torch.empty(x_TND.shape, dtype=x_TND.dtype, device=x_TND.device)
    if turned < x_TND.shape[-1]:
        out[..., turned:] = x_TND[..., turned:]
    for part in _parts(x_TND.flatten(1)):
        x, into = x_TND[part, :, :turned], out[part, :, :turned]
        torch.mul(x, cos_T1D[part], out=into)
        into.addcmul_(x.roll(turned // 2, -1), sin_T1D[part], value=sign)
    return out


def rotate(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on the first D dimensions: i and i + D / 2 are turned by one angle; the others stay.

    Args:
        x_TND: [T, heads, head_dim].
        cos_T1D: [T, 1, D], like x: cosines of the angles, each twice.
        sin_T1D: the same of the sines, the first half negated.
    """
    return _Rotate.apply(x_TND, cos_T1D, sin_T1D)  # type: ignore[no-any-return]
