"""transformers' model as a rollout engine: token ids in, sampled token ids and their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aligner.models.spec import Head, ModelSpec
from aligner.models.transformers_model import empty_model, held_tensors
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.engine import RolloutEngine, SharedTensors
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.requests import Sample
from aligner.rollout.transformers.requests import BatchedRequests
from aligner.rollout.transformers.residency import DroppedCaches, FreedWeights
from aligner.rollout.transformers.sizes import PREFILL_TOKENS
from aligner.rollout.transformers.weights import TransformersWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aligner.reshard.plan.layout import WeightLayout
    from aligner.spmd.memory import Meter
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part


T = TypeVar("T")


class TransformersEngine(RolloutEngine):
    """The whole model on this rank. Nothing of the process's random state is used."""

    def __init__(
        self,
        spec: ModelSpec,
        config: RolloutConfig,
        device: torch.device,
        stop: Sequence[int] | None = None,
        loaded: LoadedWeights | None = None,
        layout: WeightLayout | None = None,
        shared: SharedTensors | None = None,
    ) -> None:
        """Args:
            stop: tokens that end a response; None: those that the model's own files name.
            loaded: the role's record of which weights its engines hold; None: one of this engine's own.
            layout: of all ranks of the role; None: an engine by itself.
            shared: memory of its parameters, and of the buffers that checkpoints hold, which a policy owns and updates; None:
                the engine's own.

        Raises ValueError where transformers does not know the model.
        """
        self.spec, self.config, self.device = spec, config, device
        self.loaded = loaded or LoadedWeights()
        self.model = _allocated(spec, getattr(torch, config.dtype), device, shared)
        self._owns_weights = shared is None
        saved = self.model.state_dict().keys()
        buffers = {name: value for name, value in self.model.named_buffers() if name in saved}
        self.storages: dict[str, Tensor] = {**dict(self.model.named_parameters()), **buffers}
        """The model's parameters, and the buffers that checkpoints hold."""
        self.requests: BatchedRequests = BatchedRequests(
            self.model,
            spec.vocab,
            spec.eos_token_ids if stop is None else stop,
            self.loaded,
            config.max_num_seqs,
            config.max_batched_tokens or PREFILL_TOKENS,
            spec.max_positions,
        )
        self._weights = TransformersWeights(spec, self.storages, self.loaded, self.new_weights, layout)

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        mesh: Mesh,
        group: dist.ProcessGroup,
        ident: str,
        config: RolloutConfig,
        device: torch.device,
        *,
        layout: WeightLayout,
        sleeps: bool,
        loaded: LoadedWeights,
        shared: SharedTensors | None = None,
    ) -> Self:
        """Not collective: each rank is a replica."""
        return cls(spec, config, device, None, loaded, layout, shared)

    def close(self) -> None:
        """Free the model."""
        self.requests.abort()
        self.loaded.evict()
        for tensor in self.storages.values() if self._owns_weights else ():
            tensor.untyped_storage().resize_(0)

    @property
    def weights(self) -> TransformersWeights:
        """The model's parameters."""
        return self._weights

    def new_weights(self) -> None:
        """Drop the KV caches."""
        self.requests.forget_caches()

    def parts(self, meter: Meter) -> Mapping[str, Part]:
        """Freed storages, dropped caches; shared weights are the policy's part."""
        cache = {"cache": DroppedCaches(self.requests)}
        return {"weights": FreedWeights(self.storages.values(), self.loaded), **cache} if self._owns_weights else cache

    def resume(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Queue samples."""
        self.loaded.check()
        return self.requests.start(samples, sampling, step_tokens)

    def finish(self, ticket: int) -> list[Sample]:
        """Decode until they have ended."""
        return self.requests.finish(ticket)

    def work_until(self, enough: Callable[[], bool]) -> None:
        """Decode until `enough()` or until nothing is left."""
        while self.requests.under_way and not enough():
            self.requests.advance()

    def working(self) -> AbstractContextManager[None]:
        """It needs none."""
        return nullcontext()

    def from_first(self, value: T) -> T:
        """Each rank is a replica."""
        return value


def _allocated(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, shared: SharedTensors | None
) -> PreTrainedModel:
    """The model with memory for its parameters, whose contents are undefined, or with the memory of `shared`."""
    model = empty_model(spec.path, Head.LANGUAGE, dtype=dtype, trust_remote_code=spec.trust_remote_code)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # torch's attention kernels would ignore it
    in_checkpoints = {held.storage for held in held_tensors(spec)}
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # else a tied output layer
                    made[id(parameter)] = _memory_of(prefix + name, parameter, device, shared)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                theirs = shared is not None and prefix + name in in_checkpoints
                module._buffers[name] = shared(prefix + name) if theirs else buffer.to(device)  # type: ignore[misc]
    return model.eval()


def _memory_of(name: str, parameter: nn.Parameter, device: torch.device, shared: SharedTensors | None) -> nn.Parameter:
    """A parameter of the same form that has memory."""
    if shared is None:
        return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=False)
    tensor = shared(name)
    assert (tensor.shape, tensor.dtype) == (parameter.shape, parameter.dtype), (
        f"{name} is {tensor.dtype} {tensor.shape}"
    )
    return nn.Parameter(tensor, requires_grad=False)
