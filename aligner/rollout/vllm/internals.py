"""What weights and residency need of vLLM's insides."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.rollout.config import RolloutConfig
    from aligner.rollout.loaded import LoadedWeights


class VllmInternals(Protocol):
    """A `VllmEngine`, seen from inside."""

    spec: ModelSpec
    config: RolloutConfig
    device: torch.device
    loaded: LoadedWeights

    @property
    def model(self) -> torch.nn.Module:
        """vLLM's model, this rank's shard."""

    @property
    def caches(self) -> list[torch.Tensor]:
        """The KV cache, a tensor for each layer."""

    @property
    def executor(self) -> Any:
        """vLLM's executor, which puts the engine to sleep."""

    def inside(self) -> AbstractContextManager[None]:
        """The surroundings that vLLM's own code needs; the process is as before afterwards."""

    def packing(self) -> AbstractContextManager[None]:
        """As `inside`, for packing weights and calling kernels: what draws no random numbers and sets no environment variables."""

    def gather(self, value: Any) -> list[Any]:
        """The value that each rank of the replica gives; collective."""

    def new_weights(self) -> None:
        """Forget every KV cache entry."""
