"""Reduce-scatter of gradients on CPUs, for FSDP: gloo's own reduces all of a gradient on every rank, and copies it first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


class ReduceScatter:
    """Each rank sends every other rank's part to it and adds what it receives to its own: half of an all-reduce's bytes, and
    one part of extra memory. FSDP calls it in place of `torch.distributed.reduce_scatter_tensor` (see
    `FSDPModule.set_custom_reduce_scatter`)."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory for the whole gradients of a layer, and that for this rank's part of them."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum over the group, each part on its rank in a fixed order of ranks.

        Args:
            output_tensor: [N / ranks], this rank's part of the sum.
            input_tensor: [N], the parts of all ranks in their order; freed here, where FSDP would keep it until the next
                layer's gradients are made.
        """
        assert op == dist.ReduceOp.SUM and not async_op, "engine=fsdp sums gradients, and a CPU has no streams"
        ranks, rank = group.size(), group.rank()
        parts = input_tensor.view(ranks, -1)
        others = [(rank + step) % ranks for step in range(1, ranks)]
        sends = [dist.isend(parts[other], group=group, group_dst=other) for other in others]
        output_tensor.copy_(parts[rank])
        received = torch.empty_like(output_tensor)
        for other in reversed(others):  # the rank one step back sends to this one first
            dist.recv(received, group=group, group_src=other)
            output_tensor += received
        for send in sends:
            assert send is not None, "a rank of the group"
            send.wait()
        input_tensor.untyped_storage().resize_(0)


def save_memory_on_cpu(module: FSDPModule) -> None:
    """Where communication does not run beside computation, gather no layer before it is needed, and scatter by `ReduceScatter`."""
    module.set_modules_to_backward_prefetch([module])  # none: it is there already
    module.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]


def begin_sums(module: FSDPModule) -> None:
    """After the first of several backward passes in bfloat16: a float32 sum of zeros for each parameter that had no gradient, such
    as an expert that no token chose. FSDP reduces a module's gradients together, which have to be of one type, and would have the
    last pass's in bfloat16 where no earlier one had any."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            if parameter.unsharded_accumulated_grad is None and parameter.sharded_param.requires_grad:
                zeros = torch.zeros_like(parameter._unsharded_param, dtype=parameter.reduce_dtype, requires_grad=False)
                parameter.unsharded_accumulated_grad = zeros
