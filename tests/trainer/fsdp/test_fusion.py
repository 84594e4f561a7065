"""Fused norms and MLPs inside transformers' models: used where a module computes the same, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from aligner.trainer.fsdp.fusion import fuse

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLP = {"mlp"}
NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}
FUSED: dict[str, set[str]] = {
    "Llama": MLP | NORMS,
    "Qwen3": MLP | NORMS | {"q_norm", "k_norm"},
    "Gemma2": MLP | NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    "Phi3": MLP | NORMS,
    "Cohere2": MLP,  # its norm subtracts the mean
    "GPTNeoX": set(),
}


@pytest.mark.parametrize("family", FUSED)
def test_a_model_computes_what_it_did(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**SIZES)
    plain = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(plain.state_dict())
    assert {path.rpartition(".")[2] for path in fuse(model)} == FUSED[family]
    tokens = torch.randint(3, 64, (2, 9))
    outputs = [each(tokens, use_cache=False).logits for each in (plain, model)]
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-4 * float(outputs[0].detach().abs().max()))
    for logits in outputs:
        logits.log_softmax(-1)[..., 5].sum().backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert float((one.grad - other.grad).abs().max()) <= 1e-4 * float(one.grad.abs().max().clamp(min=1e-3)), name


class Norm(nn.Module):
    """An RMS norm, but for what a subclass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(16)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Halved(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class OutsideRoot(Norm):
    """Its epsilon is added to the root: the same for inputs of a usual size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class OptionalGate(Norm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * F.silu(gate)


class Clamped(nn.Module):
    """A gated MLP with a step more, which large values alone may need."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=self.limit) * self.up_proj(x))


def test_modules_that_compute_something_else_stay() -> None:
    assert fuse(nn.ModuleList([Norm(), Halved(), OutsideRoot(), Clamped(0.1), Clamped(10.0), nn.LayerNorm(16)])) == [
        "0"
    ]


def test_layers_of_one_class_are_told_apart_by_their_settings() -> None:
    assert fuse(nn.ModuleList([Clamped(float("inf")), Clamped(10.0), Clamped(float("inf"))])) == ["0", "2"]


def test_a_clamp_of_transformers_own_is_seen() -> None:
    config = DeepseekV4Config(hidden_size=16, moe_intermediate_size=24, intermediate_size=24)
    assert config.swiglu_limit > 1 and fuse(nn.ModuleList([DeepseekV4MLP(config)])) == []


def test_one_plus_the_weight_is_not_rounded_to_bfloat16() -> None:
    """In bfloat16, 1 + 0.003 is 1."""
    norm: Any = Gemma2RMSNorm(256).bfloat16()
    nn.init.constant_(norm.weight, 0.003)
    torch.manual_seed(0)
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    expected = norm(x)
    assert fuse(nn.ModuleList([norm])) == ["0"]
    assert torch.equal(norm(x), expected)


def test_a_gate_that_is_given_counts() -> None:
    norm, x, gate = OptionalGate(), torch.randn(4, 16), torch.randn(4, 16)
    expected = norm(x), norm(x, gate)
    assert fuse(nn.ModuleList([norm])) == ["0"]
    assert torch.allclose(norm(x), expected[0], atol=1e-6) and torch.equal(norm(x, gate), expected[1])
