"""Megatron's AdamW for one role, with the learning rate set at every step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from aligner.trainer.config import OptimizerConfig
from aligner.trainer.megatron.gradient_reduction import CollectivesOf, reduced_chunks
from aligner.trainer.megatron.groups import optimizer_world
from aligner.trainer.megatron.model import ShardedModel


class Optimizer:
    """Gradient buffers, float32 master weights for bfloat16 parameters, AdamW, clipping by the global norm."""

    def __init__(
        self,
        model: ShardedModel,
        config: OptimizerConfig,
        groups: ProcessGroupCollection,
        cpu_collectives: CollectivesOf,
        *,
        overlap: bool = False,
    ) -> None:
        """
        Args:
            cpu_collectives, overlap: see `reduced_chunks`.
        """
        self.config = config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.chunks = reduced_chunks(
                model, groups, cpu_collectives, distributed=config.distributed, overlap=overlap
            )
            bf16 = model.config.params_dtype == torch.bfloat16
            with optimizer_world(groups.intra_dist_opt):
                self.inner: Any = get_megatron_optimizer(
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
                    list(self.chunks),
                    use_gloo_process_groups=False,
                    pg_collection=groups,
                )

        for one in self.inner.chained_optimizers:  # type: ignore[attr-defined]
            _fuse(one)

    def zero_grad(self) -> None:
        """Zero the gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def gradient_buffers(self) -> list[Tensor]:
        """Megatron's flat buffers of float32 gradients."""
        return [
            buffer.grad_data for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    @torch.no_grad()
    def norm(self) -> float:
        """L2 norm of the gradients over the role's ranks, before clipping; changes no weights."""
        self.inner.prepare_grads()
        return float(self.inner.get_grad_norm())

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> None:
        """One AdamW step at learning rate `lr`; `norm` is the result of `norm()`, called before.

        Megatron's own `step` computes the norm and steps whatever it is, so its parts are called here instead.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            # normally set by Megatron's scheduler: norms and biases have wd_mult=0
            group["weight_decay"] = self.config.weight_decay * group.get("wd_mult", 1.0)
        scale = self.config.clip_grad / (norm + 1e-6)
        if self.config.clip_grad > 0 and scale < 1:
            for chained in self.inner.chained_optimizers:
                parameters = [] if getattr(chained, "is_stub_optimizer", False) else chained.get_parameters()
                # in place, where Megatron's function makes each gradient again
                grads = [one.grad for one in parameters if one.grad is not None]
                if grads:
                    torch._foreach_mul_(grads, scale)
        self.inner.step_with_ready_grads()


def _fuse(optimizer: Any) -> None:
    """Let torch's AdamW, which Megatron takes where neither TransformerEngine nor Apex is there, update all parameters in one pass."""
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.Adam):
        for group in inner.param_groups:
            group.update(fused=True, foreach=False)
