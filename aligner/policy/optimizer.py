"""Megatron's data-parallel wrapper and AdamW for one role, with the learning rate set at every step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from aligner.policy.config import OptimizerConfig
from aligner.policy.groups import optimizer_world
from aligner.policy.model import ShardedModel


class Optimizer:
    """Gradient buffers, fp32 master weights where parameters are bf16, AdamW, clipping by the global norm."""

    def __init__(self, model: ShardedModel, config: OptimizerConfig, groups: ProcessGroupCollection) -> None:
        self.config = config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reduction = DistributedDataParallelConfig(
                use_distributed_optimizer=config.distributed, overlap_grad_reduce=False, grad_reduce_in_fp32=True
            )
            self.chunks = [
                DistributedDataParallel(model.config, reduction, chunk, pg_collection=groups) for chunk in model.chunks
            ]
            bf16 = model.config.params_dtype == torch.bfloat16
            with optimizer_world(groups.intra_dist_opt):
                self.inner = get_megatron_optimizer(
                    MegatronOptimizerConfig(
                        optimizer="adam",
                        lr=config.lr,
                        adam_beta1=config.beta1,
                        adam_beta2=config.beta2,
                        adam_eps=config.eps,
                        weight_decay=config.weight_decay,
                        clip_grad=config.clip_grad,
                        use_distributed_optimizer=config.distributed,
                        bf16=bf16,
                        params_dtype=model.config.params_dtype,
                    ),
                    self.chunks,
                    use_gloo_process_groups=False,
                    pg_collection=groups,
                )

        def finish_gradients(models: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
            # the loss's own weights hold the global denominator; a second division would be silent
            finalize_model_grads(models, None, pg_collection=groups)

        model.config.finalize_model_grads_func = finish_gradients

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def step(self, lr: float) -> float:
        """One AdamW step at learning rate `lr`. Returns the gradient norm before clipping.

        Raises:
            RuntimeError: the gradient norm is not finite; the weights are as before.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            # Megatron leaves this to its own scheduler: norms and biases carry wd_mult=0
            group["weight_decay"] = self.config.weight_decay * group.get("wd_mult", 1.0)
        _, norm, _ = self.inner.step()
        return float(norm)
