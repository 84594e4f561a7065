"""Offline batch generation with the transformers library's own model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from aligner.models.checkpoint import read_weights
from aligner.models.read_spec import read_spec
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.offline import OfflineEngine
from aligner.rollout.requests import Sample
from aligner.rollout.transformers.engine import TransformersEngine
from aligner.rollout.transformers.sizes import check_model
from aligner.spmd.device_check import check_device
from aligner.spmd.mesh import Mesh


class TransformersOffline(OfflineEngine):
    """A whole model in this process."""

    def __init__(
        self,
        model: str | Path,
        *,
        stop: Sequence[int],
        tensor: int = 1,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int = 256,
        kv_cache_mib: int | None = None,
        gpu_memory_utilization: float = 0.9,
        trust_remote_code: bool = False,
    ) -> None:
        if tensor != 1:
            raise ValueError(f"--tensor {tensor}: --engine transformers holds the whole model on one device; use 1.")
        spec = read_spec(model, trust_remote_code)
        device = torch.device(check_device())
        config = RolloutConfig("transformers", spec.dtype if dtype == "auto" else dtype, max_model_len, max_num_seqs)
        check_model(spec, Mesh((0,), name="rollout"), config, cpu=device.type == "cpu")
        self._engine = TransformersEngine(spec, config, device, stop)
        read_weights(spec, self._engine.weights)

    def answers(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, num_samples: int = 1
    ) -> list[list[Sample]]:
        """As in a job, with this engine on any device and vLLM on a CPU."""
        return self._engine.generate([list(prompt) for prompt in prompts], seeds, sampling, num_samples)
