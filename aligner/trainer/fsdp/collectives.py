"""FSDP's collectives on CPUs: those of `CpuCollectives`, straight between its parameters and gradients of several ranks.

FSDP copies a layer's shards into one buffer, gathers that and copies each parameter out of it, and copies gradients into one before it
reduces them: on CPUs these copies take longer than the exchange. Here its buffers are `Unmade`, which have no memory and keep what
FSDP would copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from aligner.spmd.cpu_collectives import CpuCollectives


class Unmade(Tensor):
    """Stands for a buffer of FSDP's that is not made: [N], or the same as [ranks, N / ranks]."""

    sources: list[Tensor]
    """What FSDP copies into it."""
    copy_out: Callable[[list[Tensor], Sequence[Tensor]], None] | None
    """Does with `sources` what FSDP's copy out of it does, for the tensors that it copies to."""

    @staticmethod
    def __new__(
        cls,
        size: Sequence[int | torch.SymInt],
        dtype: torch.dtype,
        device: torch.device,
        copy_out: Callable[[list[Tensor], Sequence[Tensor]], None] | None = None,
    ) -> Self:
        """Without memory."""
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        made.sources, made.copy_out = [], copy_out
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """FSDP's own operations, and the view of the buffer by ranks."""
        fsdp = torch.ops.fsdp
        if function is torch.ops.aten.view.default:
            buffer, shape = args
            ranks = shape[0]
            view = cls((ranks, buffer.numel() // ranks), buffer.dtype, buffer.device, buffer.copy_out)
            view.sources = buffer.sources
            return view
        if function is fsdp.all_gather_copy_in.default:
            inputs, buffer = args[:2]
            buffer.sources[:] = inputs
            return cls((buffer.numel(),), buffer.dtype, buffer.device), buffer
        if function is fsdp.split_with_sizes_copy.default:
            buffer = args[0]
            buffer.copy_out(buffer.sources, kwargs["out"])
            buffer.sources.clear()
            return None
        if function is fsdp.chunk_cat.default:
            kwargs["out"].sources[:] = args[0]
            return None
        raise RuntimeError(f"FSDP of torch {torch.__version__} calls {function} on its buffers")


class AllGather:
    """FSDP calls it in place of `torch.distributed.all_gather_single` (see `FSDPModule.set_custom_all_gather`)."""

    def __init__(self, collectives: CpuCollectives) -> None:
        self.collectives = collectives

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """No memory."""
        return Unmade(size, dtype, device, self.collectives.all_gather)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Nothing yet: the parameters, to which FSDP copies next, get their parts then."""
        assert not async_op, "engine=fsdp gathers a layer when it is needed, and a CPU has no streams"


class ReduceScatter:
    """FSDP calls it in place of `torch.distributed.reduce_scatter_single` (see `FSDPModule.set_custom_reduce_scatter`)."""

    def __init__(self, collectives: CpuCollectives) -> None:
        self.collectives = collectives
        self._input: Unmade | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """No memory for the gradients of a layer, for which FSDP calls first; memory for this rank's part of their sum."""
        if self._input is None:
            self._input = Unmade(size, dtype, device)
            return self._input
        self._input = None
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum over the group: each rank has an equal number of rows of each gradient, the last ones fewer, with zeros for the rest.

        Args:
            output_tensor: [N / ranks], this rank's part of the sum, parameter after parameter.
            input_tensor: the whole gradients.
        """
        assert op == dist.ReduceOp.SUM and not async_op, "engine=fsdp sums gradients, and a CPU has no streams"
        assert isinstance(input_tensor, Unmade)
        ranks, rank = group.size(), group.rank()
        parts: list[list[Tensor]] = [[] for _ in range(ranks)]
        out, rest = [], output_tensor
        for gradient in input_tensor.sources:
            rows = -(-len(gradient) // ranks)
            for number, part in enumerate(parts):
                part.append(gradient[number * rows : (number + 1) * rows].reshape(-1))
            own, padded = parts[rank][-1].numel(), rows * gradient[:1].numel()
            out.append(rest[:own])
            rest[own:padded] = 0.0
            rest = rest[padded:]
        input_tensor.sources.clear()
        self.collectives.reduce_scatter(parts, out)


def use_cpu_collectives(module: FSDPModule, collectives: CpuCollectives) -> None:
    """Where communication does not run beside computation: gather no layer before it is needed."""
    module.set_modules_to_backward_prefetch([module])  # none: it is there already
    if collectives.group.size() > 1:  # else FSDP calls neither
        module.set_custom_all_gather(AllGather(collectives))  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(ReduceScatter(collectives))  # type: ignore[arg-type]


def begin_sums(module: FSDPModule) -> None:
    """After the first of several backward passes in bfloat16: a float32 sum of zeros for each parameter that had no gradient, such
    as an expert that no token chose. FSDP reduces a module's gradients together, which have to be of one type, and would have the
    last pass's in bfloat16 where no earlier one had any."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            ran = hasattr(parameter, "_unsharded_param")  # else no microbatch has gathered it
            if ran and parameter.unsharded_accumulated_grad is None and parameter.sharded_param.requires_grad:
                zeros = torch.zeros_like(parameter._unsharded_param, dtype=parameter.reduce_dtype, requires_grad=False)
                parameter.unsharded_accumulated_grad = zeros
