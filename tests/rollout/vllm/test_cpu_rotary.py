"""Rotary positions of the engine on a CPU: queries of two and of three dimensions, strided as latent attention has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aligner.rollout.vllm.cpu_rotary import mend_cpu_rotary

TOKENS, HEADS, DIM, BASE = 5, 4, 64, 10_000.0


def exact(x_TND: Tensor, neox: bool) -> Tensor:
    """By the definition (Su et al. 2021), in float64: pairs are the halves of a head (neox), or neighbours."""
    angle_TD = torch.arange(TOKENS).double()[:, None] / BASE ** (torch.arange(0, DIM, 2).double() / DIM)
    cos, sin = angle_TD.cos()[:, None], angle_TD.sin()[:, None]
    x = x_TND.double()
    one, other = x.chunk(2, -1) if neox else (x[..., 0::2], x[..., 1::2])
    turned = one * cos - other * sin, other * cos + one * sin
    return torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_every_head_is_turned_by_its_token_s_position(flat: bool, neox: bool) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    mend_cpu_rotary()
    mend_cpu_rotary()  # of several engines
    with set_current_vllm_config(VllmConfig()):
        rotary: Any = RotaryEmbedding(DIM, DIM, 32, BASE, neox, torch.float32)
    torch.manual_seed(0)
    # the last columns of queries that are wider, and one head that stands beside the latents
    query = torch.randn(TOKENS, HEADS, 2 * DIM)[..., DIM:]
    key = torch.randn(TOKENS, 3 * DIM).split([2 * DIM, DIM], -1)[1].unsqueeze(1)
    wanted = exact(query, neox), exact(key, neox)
    given = (query.reshape(TOKENS, -1), key.reshape(TOKENS, -1)) if flat else (query, key)
    found = rotary.forward_cpu(torch.arange(TOKENS), *given)
    for got, want in zip(found, wanted, strict=True):
        assert (got.view(want.shape) - want).abs().max() < 1e-5
