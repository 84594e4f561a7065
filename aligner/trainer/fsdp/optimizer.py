"""AdamW on one rank's shards: float32 masters, which are the parameters themselves, and their moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.trainer.config import OptimizerConfig
from aligner.trainer.engine import MOMENTS, OptimizerSlice
from aligner.trainer.fsdp.model import ShardedModel, local_part


class Optimizer:
    """Gradients, AdamW and clipping by the global norm for a `ShardedModel`."""

    def __init__(self, model: ShardedModel, config: OptimizerConfig, group: dist.ProcessGroup | None) -> None:
        """
        Args:
            group: ranks whose shards make up one replica of the weights; None: this rank has all of it.
        """
        self.model, self.config, self._group = model, config, group
        self.masters = {
            name: torch.nn.Parameter(local_part(parameter).detach()) for name, parameter in model.parameters.items()
        }
        # some classes have parameters that are not trained, such as biases of a router that its own rule adjusts
        held = {
            name: master
            for name, master in self.masters.items()
            if master.numel() and model.parameters[name].requires_grad
        }
        decayed = [master for name, master in held.items() if model.parameters[name].dim() > 1]
        others = [master for name, master in held.items() if model.parameters[name].dim() <= 1]
        groups = [
            {"params": members, "weight_decay": decay}
            for members, decay in ((decayed, config.weight_decay), (others, 0.0))
            if members
        ]
        self.inner = torch.optim.AdamW(
            groups or [{"params": list(self.masters.values())}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Zero the gradients: in place where they are whole here, else FSDP makes new ones."""
        parameters = list(self.model.parameters.values())
        if self.model.is_sharded:
            for parameter in parameters:
                parameter.grad = None
            return
        missing = [parameter for parameter in parameters if parameter.grad is None]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        if missing:  # in one piece of memory, which leaves no holes among activations
            sizes = [parameter.numel() for parameter in missing]
            buffer = torch.zeros(sum(sizes), device=missing[0].device)
            for parameter, part in zip(missing, buffer.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of each parameter's gradient, as far as there is one."""
        return {
            name: local_part(parameter.grad)
            for name, parameter in self.model.parameters.items()
            if parameter.grad is not None
        }

    def whole_gradients(self) -> list[Tensor]:
        """Gradients of parameters that every rank has whole, as its own rows gave them, to be summed in place; zeros are made where
        there were none."""
        gradients = []
        for name in sorted(self.model.whole.intersection(self.model.parameters)):
            parameter = self.model.parameters[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient
            gradients.append(gradient)
        return gradients

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for name, parameter in self.model.parameters.items():
            parameter.grad = self.masters[name].grad = None

    @torch.no_grad()
    def norm(self) -> float:
        """L2 norm of the gradients over the group's ranks, before clipping."""
        counted_elsewhere = self.model.whole if self._group is not None and self._group.rank() else ()
        gradients = [
            gradient
            for name, gradient in self.gradients().items()
            if gradient.numel() and name not in counted_elsewhere
        ]
        total = torch.nn.utils.get_total_norm(gradients).double().square().cpu()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return float(total.sqrt())

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> None:
        """Clip and take one step; a parameter that took no part in the loss has a gradient of zero."""
        gradients = self.gradients()
        limit = self.config.clip_grad
        if limit > 0 and norm > 0:
            scale = limit / (norm + 1e-6)
            if scale < 1:
                torch._foreach_mul_([gradient for gradient in gradients.values() if gradient.numel()], scale)
        for name, master in self.masters.items():
            master.grad = gradients[name] if name in gradients else torch.zeros_like(master)
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()

    def slices(self) -> list[OptimizerSlice]:
        """The state of each parameter's rows that this rank has; moments of what is not trained, such as buffers, are always zero."""
        kinds = MOMENTS if self.inner.state else ()
        return [
            self._slice(name, value, self._moments(value) or {kind: torch.zeros_like(value) for kind in kinds})
            for name, value in {**self.masters, **self.model.buffers}.items()
        ]

    def _slice(self, name: str, master: Tensor, moments: Mapping[str, Tensor]) -> OptimizerSlice:
        flat = {kind: value.view(-1) for kind, value in moments.items()}
        return OptimizerSlice(name, 0, master.numel(), master.detach().view(-1), flat)

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        state = self.inner.state.get(master, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def reset_moments(self, steps: int) -> None:
        """Set AdamW's step count to `steps` and its moments to zero; 0: there are none."""
        self.inner.state.clear()
        if not steps:
            return
        for master in self.masters.values():
            step = torch.tensor(float(steps), device=master.device)
            self.inner.state[master] = {"step": step, **{name: torch.zeros_like(master) for name in MOMENTS}}

    def state_tensors(self) -> Sequence[Tensor]:
        """The moments, as far as they exist; masters are the weights."""
        return [state[name] for state in self.inner.state.values() for name in MOMENTS if name in state]


class Gradients:
    """The gradients as a part of residency: they are freed, and made anew by the next backward."""

    def __init__(self, optimizer: Callable[[], Optimizer | None]) -> None:
        """
        Args:
            optimizer: returns the optimizer, once there is one.
        """
        self.resident = True
        self._optimizer = optimizer

    def bytes(self) -> int:
        """Bytes on the device once a backward has made them."""
        optimizer = self._optimizer()
        return sum(master.nbytes for master in optimizer.masters.values()) if optimizer else 0

    def changed(self) -> None:
        """Nothing to keep."""

    def evict(self) -> None:
        """Free them."""
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.drop_gradients()
        self.resident = False

    def bring(self) -> None:
        """The next backward allocates them."""
        self.resident = True
