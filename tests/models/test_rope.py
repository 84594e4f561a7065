"""Where config.json may say rotary positions, and which of it counts: as transformers' and vLLM's readers conclude."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from aligner.models.agreement import check_reading
from aligner.models.spec import read_spec
from tests.models.test_spec import OLD, written

LLAMA: dict[str, Any] = {**OLD, "architectures": ["LlamaForCausalLM"], "rope_theta": "absent"}
THREE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": THREE}, 10000.0, THREE),  # as model cards say to add it
        ({"rope_parameters": {**THREE, "rope_theta": 5e5}, "rope_scaling": None}, 5e5, THREE),
        ({"rope_parameters": {**THREE, "rope_theta": 5e5}, "rope_scaling": {}}, 5e5, THREE),
        ({"rope_scaling": {**THREE, "rope_theta": 7e4}, "rope_theta": 5e5}, 7e4, THREE),  # inside before outside
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 500000}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5}, 5e5, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_scaling": {k: v for k, v in THREE.items() if "original" not in k}}, 1e4, {**THREE, "original_max_position_embeddings": 256}),
        ({"partial_rotary_factor": 1.0}, 1e4, None),
        ({}, 1e4, None),
    ],
)  # fmt: skip
def test_what_counts(change: dict[str, Any], theta: float, scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, LLAMA, **{"rope_theta": "absent", **change}))
    assert (spec.rope_theta, spec.rope_scaling) == (theta, scaling)
    check_reading(spec)
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs["rope_theta"] == theta and theirs["rope_type"] == (scaling or PLAIN)["rope_type"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters: rope_type='dynamic' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": THREE}, "whose rope_theta=1000000.0 is then lost.* run with 10000"),
        ({"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}, "of its own for full_attention, sliding_"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "of its own for full_attention"),
        ({"rope_scaling": {**THREE, "type": "linear"}}, "rope_type='llama3' and type='linear', which differ"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_type=None is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "factor=2.0 has no meaning with rope_type='default'"),
        ({"rope_scaling": {**THREE, "attention_factor": 2.0}}, "attention_factor=2.0 has no meaning"),
        ({"rope_scaling": {**THREE, "factor": "8"}}, "positive number for factor"),
        ({"rope_scaling": {**THREE, "factor": True}}, "positive number for factor"),
        ({"rope_scaling": {**THREE, "high_freq_factor": 1.0}}, "high_freq_factor must be more than low_freq_factor=1.0"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, "rope_type='mrope'"),
        ({"rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1]}}, "mrope_section"),
        ({"rope_scaling": THREE, "original_max_position_embeddings": 32}, "original_max_position_embeddings=32 beside"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_theta": None}, "rope_theta": 5e5}, "rope_parameters: rope_theta=None must be"),
        ({"rope_theta": True}, "rope_theta=True must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a positive number"),
        ({"rope_parameters": [PLAIN]}, "rope_parameters=.* must be an object"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rotary_pct": 0.25}, "rotary_pct=0.25 is not known"),
    ],
)  # fmt: skip
def test_what_readers_would_not_agree_on_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, LLAMA, **change))


def test_positions_are_divided_so_there_are_more(tmp_path: Path) -> None:
    """Vicuna of 16,384 tokens, as published: 4,096 positions, divided by 4."""
    long = {"max_position_embeddings": 4096, "max_sequence_length": 16384}
    linear = {"rope_scaling": {"factor": 4.0, "type": "linear"}}
    assert read_spec(written(tmp_path, LLAMA, **long, **linear)).max_positions == 16384
    assert read_spec(written(tmp_path, LLAMA, **long)).max_positions == 4096
    assert read_spec(written(tmp_path, LLAMA, max_sequence_length=128)).max_positions == 128
    assert read_spec(written(tmp_path, LLAMA, rope_scaling=THREE)).max_positions == 256


def test_what_transformers_reads_otherwise_is_named(tmp_path: Path) -> None:
    """A field that both have, changed under the spec: the message is what a later release's other reading would give."""
    spec = read_spec(written(tmp_path, LLAMA))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"rope_theta": 5e5}, "transformers takes it for rope_theta=500000.0, the trained model has 10000.0"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps=0.001"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"model_type": None}, "transformers cannot read it without a model_type"),
        ({"initializer_range": 5}, "transformers cannot read initializer_range=5: .*float"),
        ({"problem_type": "single_label_classification", "id2label": {"0": "a"}}, "transformers cannot read"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            check_reading(spec)
