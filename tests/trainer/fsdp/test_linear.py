"""Linear layers of transformers' models by oneDNN: the same numbers and gradients, in 16 bits too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from aligner.trainer import products
from aligner.trainer.fsdp.linear import use_products

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LINEAR = {"Qwen2": 8, "GPT2": 5, "GPTNeoX": 5, "Mixtral": 6, "GptOss": 6}
"""Of one layer and the output layer; a mixture of experts is one."""
MIXTURE = {"num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 2, "pad_token_id": 0}
MORE: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "Qwen2": {"num_key_value_heads": 1},
    "Mixtral": MIXTURE,
    "GptOss": {**MIXTURE, "head_dim": 16},  # experts transposed, with biases, gate and up interleaved
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LINEAR)
def test_a_model_computes_what_it_did(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**SIZES, intermediate_size=48, **MORE.get(family, {}))
    plain, model = (hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval() for _ in range(2))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.load_state_dict(plain.state_dict())
    assert use_products(model) == LINEAR[family]
    tokens = torch.randint(3, 64, (2, 9))
    for each in (plain, model):
        each(tokens, use_cache=False).logits.float().log_softmax(-1)[..., 5].sum().backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        difference, size = (one.grad - other.grad).abs().max(), one.grad.abs().max()
        assert float(difference) <= (1e-5 if dtype is torch.float32 else 0.05) * float(size), name


def test_a_layer_may_be_called_by_keyword() -> None:
    plain, layer, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(2, 4)
    layer.load_state_dict(plain.state_dict())
    use_products(layer)
    torch.testing.assert_close(layer(input=x), plain(input=x))
