"""What is observed of a model's attention without memory, and calls that packed rows do not allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aligner.models.spec import Head
from aligner.models.transformers_model import empty_model
from aligner.trainer.fsdp import attention
from aligner.trainer.fsdp.attention import NotPackable
from tests.trainer.fsdp.families import FAMILIES

LAYERS = 3
EXPLICIT = ("gemma2", "gpt_oss")
CALLS = {"diffllama": 2 * LAYERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_seen(family: str, tmp_path: Path) -> None:
    attention.register()
    FAMILIES[family].save_pretrained(tmp_path)
    calls = attention.observe(empty_model(tmp_path, Head.LANGUAGE, attention.OBSERVED))
    if family == "jetmoe":  # it looks at how many tokens its experts have
        assert calls is None
    else:
        assert calls == [family in EXPLICIT] * CALLS.get(family, LAYERS)


def call(causal: bool = True, mask: Any = None, **more: Any) -> None:
    layer: Any = nn.Module()
    layer.is_causal = causal
    layer.packed_rows = attention.Rows(False, False, (2, 3), (-1, -1))
    x = torch.randn(1, 2, 5, 4)
    out, _ = attention.implementation(layer, x, x, x, mask, scaling=0.5, **more)
    assert out.shape == (1, 5, 2, 4)


def test_what_changes_nothing_may_be_given() -> None:
    call(mask=attention.window_mask(), position_ids=torch.arange(5)[None], use_cache=False, dropout=0.0, bias=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": torch.zeros(1, 1, 5, 5, dtype=torch.long)}, "Module makes a mask of its own"),
        ({"mask": torch.zeros(1, 1, 1, 1)}, "Module makes a mask of its own"),
        ({"causal": False}, "Module attends to later tokens"),
        ({"is_causal": False}, "Module attends to later tokens"),
        ({"position_bias": torch.zeros(5)}, "Module changes its attention by position_bias"),
        ({"score_mod": torch.add}, "Module changes its attention by score_mod"),
    ],
)
def test_what_is_not_computed_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(NotPackable, match=message):
        call(**given)
