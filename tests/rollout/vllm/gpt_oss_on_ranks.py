"""What ranks do in test_gpt_oss.py: an engine cut over two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aligner.rollout.vllm.engine import VllmEngine
from aligner.spmd.world import World
from tests.rollout import tiny


def check_tensor_parallel(world: World, folder: Path) -> None:
    """vLLM's loader would change a checkpoint's tensor on some ranks: refused on all of them."""
    group = world.group((0, 1))
    engine = VllmEngine(folder, group, "gpt_oss", tiny.CONFIG, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sets \S+down_proj_bias to 0 on ranks .* use placement.rollout.tensor=1"):
        engine.weights.pieces()
    engine.close()
