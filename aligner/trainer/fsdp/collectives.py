"""FSDP's collectives on CPUs, by sends: gloo's own reduce-scatter reduces all of a gradient on every rank, and both it and its
all-gather copy what they are given first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


class AllGather:
    """Each rank sends its part of a layer's weights to every other one, from where it lies. FSDP calls it in place of
    `torch.distributed.all_gather_single` (see `FSDPModule.set_custom_all_gather`)."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory for a layer's whole weights."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Every rank's part, in the order of the ranks.

        Args:
            output_tensor: [N], the whole; FSDP has put this rank's part into it.
            input_tensor: [N / ranks], a view of that part.
        """
        assert not async_op, "engine=fsdp gathers a layer when it is needed, and a CPU has no streams"
        ranks, rank = group.size(), group.rank()
        parts = output_tensor.view(ranks, -1)
        assert input_tensor.data_ptr() == parts[rank].data_ptr(), "FSDP copies this rank's part into the whole"
        distances = range(1, ranks) if parts.numel() else ()
        receives = [
            dist.irecv(parts[(rank - step) % ranks], group=group, group_src=(rank - step) % ranks) for step in distances
        ]
        sends = [dist.isend(input_tensor, group=group, group_dst=(rank + step) % ranks) for step in distances]
        for work in (*receives, *sends):
            assert work is not None, "a rank of the group"
            work.wait()


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


def use_cpu_collectives(module: FSDPModule) -> None:
    """Where communication does not run beside computation: gather no layer before it is needed, and by sends."""
    module.set_modules_to_backward_prefetch([module])  # none: it is there already
    module.set_custom_all_gather(AllGather())  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]


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
