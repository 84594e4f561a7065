"""Where config.json may say rotary positions, and which of it counts: as transformers' and vLLM's readers conclude."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from aligner.models.agreement import check_reading
from aligner.models.read_spec import read_spec
from aligner.models.rope import Rope
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
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}


def without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": THREE}, 10000.0, THREE),  # as model cards say to add it
        ({"rope_parameters": {**THREE, "rope_theta": 5e5}, "rope_scaling": None}, 5e5, THREE),
        ({"rope_parameters": {**THREE, "rope_theta": 5e5}, "rope_scaling": {}}, 5e5, THREE),
        ({"rope_scaling": {**THREE, "rope_theta": 7e4}, "rope_theta": 5e5}, 7e4, THREE),  # inside before outside
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, PLAIN),
        ({"rope_parameters": {"rope_theta": 500000}}, 5e5, PLAIN),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5}, 5e5, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_theta": 5e5}, 5e5, {"rope_type": "dynamic", "factor": 2}),
        ({"rope_scaling": without(THREE, "original_max_position_embeddings")}, 1e4, {**THREE, "original_max_position_embeddings": 256}),
        ({"rope_scaling": YARN}, 1e4, YARN),
        ({"rope_scaling": without(YARN, "original_max_position_embeddings")}, 1e4, {**YARN, "original_max_position_embeddings": 256}),
        ({"rope_parameters": {**YARN, "rope_theta": 5e5, "attention_factor": None, "mscale": None}}, 5e5, YARN),
        ({"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False, "mscale": 1.0}}, 1e4, {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False, "mscale": 1.0}),
        ({"rope_scaling": LONG}, 1e4, LONG),
        ({"rope_scaling": {**LONG, "factor": 4.0}}, 1e4, {**LONG, "factor": 4.0}),
        ({"partial_rotary_factor": 1.0}, 1e4, PLAIN),
        ({}, 1e4, PLAIN),
    ],
)  # fmt: skip
def test_what_counts(change: dict[str, Any], theta: float, scaling: dict[str, Any], tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, LLAMA, **{"rope_theta": "absent", **change}))
    rope = spec.rope["full_attention"]
    assert (rope.rope_type, rope.theta, rope.partial_rotary_factor) == (scaling["rope_type"], theta, 1.0)
    assert rope.parameters == without(scaling, "rope_type", "rope_theta")
    check_reading(spec)
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs["rope_theta"] == theta and theirs["rope_type"] == scaling["rope_type"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_scaling: rope_type='ntk'"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "rope_parameters: rope_type='su' is not supported"),
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
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, "original_max_position_embeddings=32 beside"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_theta": None}, "rope_theta": 5e5}, "rope_parameters: rope_theta=None must be"),
        ({"rope_theta": True}, "rope_theta=True must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a positive number"),
        ({"rope_parameters": [PLAIN]}, "rope_parameters=.* must be an object"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rotary_pct": 0.25}, "rotary_pct=0.25 is not known"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling: factor=4 .* fails in the engine .* write 4.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "alpha=1000.0 has no meaning with rope_type='dynamic'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "max_trained_positions": 64}}, "max_trained_positions=64 has no meaning"),
        ({"rope_scaling": {"type": "dynamic"}}, "needs a positive number for factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "'dynamic' needs more than 2 rotary dimensions"),
        ({"rope_scaling": {**YARN, "factor": None}}, "rope_type 'yarn' needs a positive number for factor"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor=0 must be a positive number"),
        ({"rope_scaling": {**YARN, "attention_factor": "1"}}, "attention_factor='1' must be a positive number"),
        ({"rope_scaling": {**YARN, "beta_fast": None}}, "beta_fast=None must be a positive number"),
        ({"rope_scaling": {**YARN, "beta_slow": 0}}, "beta_slow=0 must be a positive number"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast=1 must not be less than beta_slow=2"),
        ({"rope_scaling": {**YARN, "mscale": -1.0}}, "mscale=-1.0 must be a number of at least 0"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": True}}, "mscale_all_dim=True must be a number"),
        ({"rope_scaling": {**YARN, "truncate": 0}}, "truncate=0 is neither true nor false"),
        ({"rope_scaling": {**YARN, "finetuned": True}}, "finetuned=True has no meaning with rope_type='yarn'"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "'yarn' needs a rope_theta above 1, found 1.0"),
        ({"rope_scaling": {**LONG, "short_factor": [1.0] * 3}}, "short_factor has 3 numbers; it needs 4"),
        ({"rope_scaling": {**LONG, "long_factor": [1.0, 1.0, 1.0, 0]}}, "long_factor=.* must be a list of positive numbers"),
        ({"rope_scaling": without(LONG, "short_factor")}, "short_factor=None must be a list"),
        ({"rope_scaling": {**LONG, "factor": 2.0}}, "factor=2.0 is not the 4.0 that follows"),
        ({"rope_scaling": {**LONG, "attention_factor": 1.0}}, "attention_factor=1.0 is not the 1.15.* that follows"),
        ({"rope_scaling": {**LONG, "short_mscale": 1.1}}, "short_mscale=1.1 has no meaning"),
        ({"rope_scaling": {**LONG, "original_max_position_embeddings": 1}}, "original_max_position_embeddings=1 must be more than 1"),
    ],
)  # fmt: skip
def test_what_readers_would_not_agree_on_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, LLAMA, **change))


@pytest.mark.parametrize("scaling", [YARN, LONG, {"type": "dynamic", "factor": 2.0}])
def test_transformers_cannot_scale_a_head_dim_of_null(scaling: dict[str, Any], tmp_path: Path) -> None:
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2, "num_local_experts": 4}
    with pytest.raises(ValueError, match=r"without head_dim, .* add head_dim=8 to config\.json"):
        read_spec(written(tmp_path, LLAMA, **mixtral, rope_scaling=scaling))
    assert read_spec(written(tmp_path, LLAMA, **mixtral, rope_scaling=scaling, head_dim=8)).head_dim == 8


def test_positions_are_divided_so_there_are_more(tmp_path: Path) -> None:
    """Vicuna of 16,384 tokens, as published: 4,096 positions, divided by 4."""
    long = {"max_position_embeddings": 4096, "max_sequence_length": 16384}
    linear = {"rope_scaling": {"factor": 4.0, "type": "linear"}}
    assert read_spec(written(tmp_path, LLAMA, **long, **linear)).max_positions == 16384
    assert read_spec(written(tmp_path, LLAMA, **long)).max_positions == 4096
    assert read_spec(written(tmp_path, LLAMA, max_sequence_length=128)).max_positions == 128
    assert read_spec(written(tmp_path, LLAMA, rope_scaling=THREE)).max_positions == 256


@pytest.mark.parametrize(
    ("change", "positions", "reason"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 256, "'dynamic': beyond them .* the longest sequence of a batch"),
        ({"rope_scaling": LONG}, 64, "'longrope': beyond original_max_position_embeddings .* long_factor"),
        ({"rope_scaling": YARN}, 256, ""),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 256}}, 256, ""),  # as Qwen's cards say, half done
        ({"rope_scaling": {**YARN, "factor": 2.5}}, 160, ""),  # the engine's table has no more
        ({"rope_scaling": THREE}, 256, ""),
    ],
)  # fmt: skip
def test_sequences_end_where_transformers_and_the_engine_part(
    change: dict[str, Any], positions: int, reason: str, tmp_path: Path
) -> None:
    spec = read_spec(written(tmp_path, LLAMA, **change))
    assert spec.max_positions == positions
    assert re.search(reason, spec.positions_text) and str(positions) in spec.positions_text


GEMMA3: dict[str, Any] = {
    **without(OLD, "rope_theta"),
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 8,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("change", "full", "sliding"),
    [
        ({}, Rope(theta=1e6), Rope(theta=1e4)),
        ({"rope_theta": 5e5, "rope_local_base_freq": 500, "rope_scaling": None}, Rope(theta=5e5), Rope(theta=500.0)),
        ({"rope_theta": 5e5, "rope_scaling": LINEAR}, Rope("linear", 5e5, 1.0, {"factor": 8.0}), Rope(theta=1e4)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, Rope(theta=5e5), Rope(theta=1e4)),
        ({"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 7.0}}}, Rope(theta=1e6), Rope(theta=7.0)),
        ({"rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 5e5}, "sliding_attention": PLAIN}}, Rope("linear", 5e5, 1.0, {"factor": 8.0}), Rope(theta=1e4)),
    ],
)  # fmt: skip
def test_layer_types_have_rotary_positions_of_their_own(
    change: dict[str, Any], full: Rope, sliding: Rope, tmp_path: Path
) -> None:
    spec = read_spec(written(tmp_path, GEMMA3, **change))
    assert spec.rope == {"full_attention": full, "sliding_attention": sliding}
    assert spec.layer_types == ("sliding_attention", "full_attention") * 3
    assert (spec.windows, spec.max_positions) == ((16, None) * 3, 256)  # config.json's are those after scaling
    check_reading(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": PLAIN}, "rope_parameters: rope_theta is no layer type of this family; .* full_attention, sliding_"),
        ({"rope_parameters": {"full_attention": 1.0}}, r"rope_parameters: full_attention=1.0 must be an object, or null"),
        ({"rope_parameters": {"chunked_attention": PLAIN}}, "chunked_attention is no layer type"),
        ({"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, r"rope_parameters\.full_attention: truncate=false is ignored"),
        ({"rope_parameters": {"full_attention": PLAIN}, "rope_theta": 5e5}, "rope_theta=500000.0 is not the rope_theta=10000.0 of rope_parameters.full"),
        ({"rope_parameters": {"full_attention": PLAIN}, "rope_scaling": LINEAR}, "rope_scaling beside rope_parameters"),
        ({"rope_parameters": {"sliding_attention": {**PLAIN, "factor": 2.0}}}, r"rope_parameters\.sliding_attention: factor=2.0 has no meaning"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_local_base_freq": "100"}, "rope_local_base_freq='100' must be a positive number"),
        ({"rope_local_base_freq": None}, "rope_local_base_freq=None must be a positive number"),
        ({"sliding_window": None}, "sliding_window must be a positive whole number, found None"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive whole number"),
        ({"layer_types": ["full_attention"]}, "layer_types must be null or a list of as many entries as num_hidden_layers=6"),
        ({"layer_types": ["full_attention"] * 5 + ["chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported; only final_logit_softcapping=null is"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive whole number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_layer_types_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, GEMMA3, **change))


PHI3: dict[str, Any] = {**without(OLD, "rope_theta"), "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 1.0),
        ({"partial_rotary_factor": 0.5}, 0.5),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}, "hidden_size": 64, "num_attention_heads": 4}, 0.75),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {**LONG, "short_factor": [1.0] * 2, "long_factor": [1.0] * 2}, "original_max_position_embeddings": 64}, 0.5),
    ],
)  # fmt: skip
def test_a_part_of_each_head_is_rotated(change: dict[str, Any], factor: float, tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, PHI3, **change))
    assert spec.rope["full_attention"].partial_rotary_factor == factor
    check_reading(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 must be .* that makes an even part of head_dim=8"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor=0 must be a number above 0 and at most 1"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 must be"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": "1"}}, "rope_parameters: partial_rotary_factor='1' must be"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0 is not the 0.5 of rope_parameters"),
        ({"rope_scaling": YARN}, "rope_type='yarn' is not supported; supported are 'default', 'longrope'"),
        ({"rope_scaling": LONG}, "original_max_position_embeddings=4096 beside rope_scaling is not the 64"),  # its class's own
        ({"pad_token_id": "absent"}, "pad_token_id is not there, for which transformers takes 32000"),
    ],
)  # fmt: skip
def test_what_phi_3_cannot_compute_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, PHI3, **change))


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
