"""FSDP's collectives on CPUs: those of `CpuCollectives`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from aligner.spmd.cpu_collectives import CpuCollectives


class _Collective:
    """What FSDP asks of an all-gather and a reduce-scatter of another's."""

    def __init__(self, collectives: CpuCollectives) -> None:
        self.collectives = collectives

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory for a layer's whole weights or gradients, or for this rank's part of them."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Collective):
    """FSDP calls it in place of `torch.distributed.all_gather_single` (see `FSDPModule.set_custom_all_gather`)."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Every rank's part, in the order of the ranks.

        Args:
            output_tensor: [N], the whole; FSDP has put this rank's part into it.
            input_tensor: [N / ranks], a view of that part.
        """
        assert not async_op, "engine=fsdp gathers a layer when it is needed, and a CPU has no streams"
        own = output_tensor.view(group.size(), -1)[group.rank()]
        assert input_tensor.data_ptr() == own.data_ptr(), "FSDP copies this rank's part into the whole"
        self.collectives.all_gather(output_tensor)


class ReduceScatter(_Collective):
    """FSDP calls it in place of `torch.distributed.reduce_scatter_tensor` (see `FSDPModule.set_custom_reduce_scatter`)."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum over the group, each part on its rank.

        Args:
            output_tensor: [N / ranks], this rank's part of the sum.
            input_tensor: [N], the parts of all ranks in their order; freed here, where FSDP would keep it until the next
                layer's gradients are made.
        """
        assert op == dist.ReduceOp.SUM and not async_op, "engine=fsdp sums gradients, and a CPU has no streams"
        self.collectives.reduce_scatter(input_tensor, output_tensor)
        input_tensor.untyped_storage().resize_(0)


def use_cpu_collectives(module: FSDPModule, collectives: CpuCollectives) -> None:
    """Where communication does not run beside computation: gather no layer before it is needed."""
    module.set_modules_to_backward_prefetch([module])  # none: it is there already
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
