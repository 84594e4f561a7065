"""Rotary tables against transformers' own modules and against the engine's, for every rope_type."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from aligner.models.read_spec import read_spec
from aligner.models.rope import Rope
from aligner.models.spec import LayerType, ModelSpec
from aligner.trainer.megatron.rotary import PackedRotary, RotarySlice, inverse_frequencies, rotary_slice, rotary_slices
from tests.models.test_spec import OLD, written

HEAD_DIM, POSITIONS, THETA = 32, 256, 5e5
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GROWN = [1.0 + 0.25 * pair for pair in range(HEAD_DIM // 2)]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.7},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn without original": {"rope_type": "yarn", "factor": 1.5},
    "yarn that shrinks": {**YARN, "factor": 0.5, "original_max_position_embeddings": 512},
    "yarn with a factor of its own": {**YARN, "attention_factor": 1.7},
    "yarn with mscale": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.3},
    "yarn with half of mscale": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.0},
    "yarn with betas": {**YARN, "beta_fast": 4.5, "beta_slow": 2},
    "yarn not truncated": {**YARN, "beta_fast": 8, "truncate": False},
    "yarn with a step": {**YARN, "beta_fast": 1, "beta_slow": 1, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": GROWN,
        "long_factor": [2 * one for one in GROWN],
        "original_max_position_embeddings": 64,
    },
}


def model(folder: Path, scaling: dict[str, Any]) -> ModelSpec:
    sizes = {"architectures": ["LlamaForCausalLM"], "head_dim": HEAD_DIM, "max_position_embeddings": POSITIONS}
    return read_spec(written(folder, OLD, **sizes, rope_theta=THETA, rope_scaling=scaling or "absent"))


def cosines_and_sines(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """[max_positions, head_dim] each: as they multiply queries and keys, attention factor included."""
    rotary, ((_, part),) = PackedRotary(spec, torch.device("cpu")), rotary_slices(spec)
    rotary.positions_T = torch.arange(spec.max_positions)
    angle = rotary()[:, 0, 0]
    return angle.cos() * part.attention_factor, angle.sin() * part.attention_factor


@pytest.mark.parametrize("name", SCALINGS)
def test_transformers_turns_by_the_same_angles(name: str, tmp_path: Path) -> None:
    spec = model(tmp_path, SCALINGS[name])
    config = AutoConfig.from_pretrained(tmp_path)
    theirs = LlamaRotaryEmbedding(config)
    ours, attention_factor = inverse_frequencies(spec.rope["full_attention"], HEAD_DIM), theirs.attention_scaling
    if name != "default":
        expected, attention_factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config)
        torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0.0)
    assert spec.rope["full_attention"].attention_factor == pytest.approx(attention_factor, rel=1e-12)
    cos, sin = theirs(torch.zeros(1), torch.arange(spec.max_positions)[None])
    for own, other in zip(cosines_and_sines(spec), (cos[0], sin[0]), strict=True):
        torch.testing.assert_close(own, other, rtol=0.0, atol=6e-5)  # angles of hundreds, in float32


@pytest.mark.parametrize("name", SCALINGS)
def test_the_engine_has_the_same_table(name: str, tmp_path: Path) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    spec = model(tmp_path, SCALINGS[name])
    config = AutoConfig.from_pretrained(tmp_path)
    settings = VllmConfig()
    if name == "longrope":  # which asks for the longest sequence that the engine is made for
        settings.model_config = type("Limit", (), {"max_model_len": spec.max_positions})()
    with set_current_vllm_config(settings):
        theirs = get_rope(HEAD_DIM, POSITIONS, rope_parameters=config.rope_parameters, dtype=torch.float32)
    table = theirs.long_short_cos_sin_cache if name == "longrope" else theirs.cos_sin_cache
    assert len(table) >= spec.max_positions
    for own, half in zip(cosines_and_sines(spec), table[: spec.max_positions].chunk(2, -1), strict=True):
        torch.testing.assert_close(own, torch.cat([half, half], -1), rtol=0.0, atol=6e-5)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (Rope(theta=100.0), [1.0, 10**-0.5, 0.1, 10**-1.5]),
        (Rope("linear", 100.0, 0.5, {"factor": 5.0}), [0.2, 0.02]),
        # in 200 pi positions the pairs turn 100 and 10 times: the second is half way down the ramp from 100 turns to 1
        (
            Rope("yarn", 100.0, 0.5, {"factor": 4.0, "original_max_position_embeddings": 200 * math.pi, "beta_fast": 100,
                                      "beta_slow": 1, "truncate": False}),
            [1.0, 0.1 * (0.5 + 0.5 / 4)],
        ),
    ],
)  # fmt: skip
def test_frequencies_worked_by_hand(rope: Rope, expected: list[float]) -> None:
    torch.testing.assert_close(inverse_frequencies(rope, 8), torch.tensor(expected), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("rotated", [HEAD_DIM, 24])
def test_the_factor_on_queries_makes_the_scores_of_a_factor_on_both(rotated: int) -> None:
    """In place of transformers' factor on cosines and sines; Phi-3 rotates a part of a head."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 9, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    half = torch.outer(torch.arange(9.0, dtype=torch.float64), 0.7 ** torch.arange(rotated // 2))
    angle, factor = torch.cat([half, half], -1)[None], 1.3
    own = RotarySlice(0, rotated, factor)
    q, k = (x.permute(2, 0, 1, 3) for x in (own.scale_queries(query), key))  # Megatron's [T, B, heads, head_dim]
    q, k = (_apply_rotary_pos_emb_bshd(x, angle[0, :, None, None]).permute(1, 2, 0, 3) for x in (q, k))
    their_q, their_k = apply_rotary_pos_emb(query, key, angle.cos() * factor, angle.sin() * factor)
    torch.testing.assert_close(q @ k.transpose(-1, -2), their_q @ their_k.transpose(-1, -2), rtol=1e-12, atol=1e-12)


def test_layer_types_have_tables_of_their_own(tmp_path: Path) -> None:
    spec = model(tmp_path, {})
    slow, fast = Rope("yarn", THETA, 0.5, YARN, attention_factor=1.1), Rope(theta=100.0)
    types = {
        "sliding": LayerType(8, rope=fast),
        "full": LayerType(rope=slow),
        "sparse": LayerType(rope=fast, sparse=True),
    }
    spec = replace(spec, types=types)
    part = {name: rotary_slice(spec, layer_type.rope) for name, layer_type in types.items()}
    assert part["sliding"] == part["sparse"] == RotarySlice(0, HEAD_DIM, 1.0)
    assert part["full"] == RotarySlice(HEAD_DIM, HEAD_DIM + HEAD_DIM // 2, 1.1)
    rotary = PackedRotary(spec, torch.device("cpu"))
    rotary.positions_T = torch.tensor([0, 1, 2, 0, 1])  # two rows
    angle = rotary()
    assert angle.shape == (5, 1, 1, HEAD_DIM + HEAD_DIM // 2)
    assert torch.equal(angle[:3][:2], angle[3:])
    for rope, one in ((fast, part["sliding"]), (slow, part["full"])):
        frequency = inverse_frequencies(rope, HEAD_DIM)
        assert torch.equal(angle[2, 0, 0, one.start : one.stop], 2 * torch.cat([frequency, frequency]))
