"""A rollout engine by itself in this process, with the weights of its model's folder: no job, no other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from aligner.models.checkpoint import read_weights
from aligner.models.read_spec import read_spec
from aligner.rollout.config import RolloutConfig
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.engines import backend
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.quantization import SETTING, quantized_tensors
from aligner.spmd.mesh import Mesh


@contextmanager
def standalone_engine(
    model: str | Path,
    config: RolloutConfig,
    device: torch.device,
    stop: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> Iterator[RolloutEngine]:
    """The engine, which is closed afterwards. The process must have no process group.

    Args:
        stop: tokens that end a response; None: those that the model's own files name.

    Raises:
        ValueError: settings and model do not go together.
    """
    spec = read_spec(str(model), trust_remote_code)
    spec = spec if stop is None else replace(spec, eos_token_ids=tuple(stop))
    mesh, loaded, kind = Mesh((0,), 1, 1), LoadedWeights(), backend(config.engine)
    config.check_length(spec)
    kind.check(spec, mesh, config, device.type == "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layout = kind.layout(spec, mesh, config)
        engine = kind.engine_type().build(
            spec, mesh, dist.new_group([0]), "alone", config, device, layout=layout, sleeps=False, loaded=loaded
        )
        try:
            read_weights(spec, engine.weights, quantized_tensors(spec, config), SETTING)
            loaded.finish()
            yield engine
        finally:
            engine.close()
    finally:
        dist.destroy_process_group()
