"""Megatron's data-parallel wrapper: gradients in flat float32 buffers, summed over data-parallel ranks after the backward or
during it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from aligner.spmd.cpu_collectives import CpuCollectives
from aligner.trainer.megatron.model import ShardedModel

CollectivesOf = Callable[[dist.ProcessGroup], CpuCollectives | None]

BUCKET_ELEMENTS: int | None = None
"""With overlap, gradients are reduced in buckets of about so many elements; None: Megatron's, 40 million, or one million for each
data-parallel rank if that is more."""


class ReducedChunk(DistributedDataParallel):
    """A chunk of the model in Megatron's wrapper."""

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Any:
        accumulate: Any = super()._make_backward_post_hook(param)

        def ready(*unused: Any) -> None:
            # The output layer adds its weight's gradient to the buffer itself; Megatron would take the absence of a gradient for
            # a parameter that the loss does not depend on.
            if self.ddp_config.overlap_grad_reduce and param.grad is None:
                self.param_to_bucket_group[param].register_grad_ready(param, self.force_all_reduce)
            else:
                accumulate(*unused)

        return ready


def reduced_chunks(
    model: ShardedModel,
    groups: ProcessGroupCollection,
    cpu_collectives: CollectivesOf,
    *,
    distributed: bool,
    overlap: bool,
) -> list[Any]:
    """The model's chunks as `ReducedChunk`s, with gradient buffers; sets how Megatron's schedules reduce them.

    Args:
        cpu_collectives: those of a group on CPUs, used where nothing overlaps; None for a group on another device.
        distributed: each data-parallel rank gets the sums of its part (reduce-scatter), for a distributed optimizer.
        overlap: reduce a bucket as soon as the last microbatch's backward has its gradients, rather than all after it.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        grad_reduce_in_fp32=True,
        bucket_size=BUCKET_ELEMENTS,
    )
    chunks = [
        # as Megatron's own training: the later chunks of a stage are reduced while earlier ones compute
        ReducedChunk(model.config, config, chunk, disable_bucketing=number > 0, pg_collection=groups)
        for number, chunk in enumerate(model.chunks)
    ]
    for chunk in chunks:
        for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            _skip_collectives_of_one(buckets)
            if distributed and buckets.intra_distributed_optimizer_instance_size > 1:
                _use_cpu_collectives(buckets, cpu_collectives(buckets.intra_distributed_optimizer_instance_group))

    def finish_gradients(models: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        # the loss is already divided by the global denominator; dividing again would be a silent error
        finalize_model_grads(models, None, pg_collection=groups)

    model.config.finalize_model_grads_func = finish_gradients
    if overlap:
        before_the_last = [chunk.no_sync for chunk in chunks]
        settings: Any = model.config
        settings.no_sync_func = before_the_last if len(chunks) > 1 else before_the_last[0]
    return chunks


def _skip_collectives_of_one(buckets: Any) -> None:
    """A data-parallel group of one rank has nothing to reduce or gather; gloo would copy every gradient and weight."""
    group = (
        buckets.intra_distributed_optimizer_instance_group
        if buckets.ddp_config.use_distributed_optimizer
        else buckets.data_parallel_group
    )
    if group.size() == 1:
        assert all(bucket.gradient_scaling_factor == 1.0 for bucket in buckets.buckets)
        nothing = lambda *_, **__: None  # noqa: E731
        buckets.start_grad_sync = buckets.start_param_sync = nothing
        if buckets.ddp_config.overlap_grad_reduce:  # without, finishing is starting
            buckets.finish_grad_sync = nothing


def _use_cpu_collectives(buckets: Any, collectives: CpuCollectives | None) -> None:
    """Sums of gradients and gathers of weights by `collectives`; those that overlap the backward stay gloo's, whose threads do them."""
    if collectives is None:
        return
    assert all(bucket.gradient_scaling_factor == 1.0 for bucket in buckets.buckets)
    ranks, place = collectives.group.size(), collectives.group.rank()

    def reduce(force_all_reduce: bool = False) -> None:
        assert not force_all_reduce, "with a distributed optimizer each rank needs its part"
        for bucket in buckets.buckets:
            parts = bucket.grad_data.view(ranks, -1)
            collectives.reduce_scatter([[part] for part in parts], [parts[place]])

    def gather(force_sync: bool = False) -> None:
        for bucket in buckets.buckets:
            parts = bucket.param_data.view(ranks, -1)
            collectives.all_gather([parts[place]], [parts])

    buckets.start_param_sync = gather
    if not buckets.ddp_config.overlap_grad_reduce:
        buckets.start_grad_sync = reduce
