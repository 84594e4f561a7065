"""Reading config.json of transformers 4 and 5; every refusal names the file, the key and what would work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from aligner.models.families import FAMILIES
from aligner.models.read_spec import read_spec
from aligner.models.rope import Rope
from aligner.models.tensors import expert_tensors, logical_tensors, parameter_count, router_tensor
from tests.models.tiny import LLAMA3_ROPE, MODELS, SIZES, save_tiny, stored_tensors, tiny_model

OLD: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 5,
}
"""As written by transformers 4."""


TYPES = {name: family for family, one in FAMILIES.items() for name in (one.architecture, one.classifier)}


def written(folder: Path, config: object, **changes: Any) -> Path:
    """`model_type` follows a change of architectures."""
    if isinstance(config, dict):
        named = changes.get("architectures", config.get("architectures"))
        if "model_type" not in changes and isinstance(named, list) and named and named[0] in TYPES:
            changes["model_type"] = TYPES[named[0]]
        config = {key: value for key, value in {**config, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_specs_and_tensors_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    spec, config = read_spec(tmp_path), model.config
    assert (spec.family, spec.layers, spec.hidden, spec.heads, spec.kv_heads) == (config.model_type, 4, 32, 8, 4)
    assert spec.head_dim == model.model.layers[0].self_attn.head_dim
    assert (spec.ffn, spec.vocab, spec.norm_eps) == (48, 67, config.rms_norm_eps)
    assert spec.tied == config.tie_word_embeddings
    for layer_type, rope in spec.rope.items():
        theirs = {"partial_rotary_factor": 1.0, **config.rope_parameters.get(layer_type, config.rope_parameters)}
        ours = (rope.rope_type, rope.theta, rope.partial_rotary_factor)
        assert ours == tuple(theirs.pop(key) for key in ("rope_type", "rope_theta", "partial_rotary_factor"))
        assert rope.parameters == theirs
    assert (spec.eos_token_ids, spec.max_positions, spec.dtype) == ((1,), 128, "float32")
    assert logical_tensors(spec) == {key: tuple(value.shape) for key, value in stored_tensors(tmp_path).items()}
    assert parameter_count(spec) == model.num_parameters()


def test_configs_of_transformers_4(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, OLD))
    assert (spec.rope, spec.dtype, spec.tied) == ({"full_attention": Rope(theta=1000000.0)}, "bfloat16", True)
    assert (spec.head_dim, spec.qkv_bias, spec.qk_norm, spec.norm_eps) == (8, True, None, 1e-5)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    llama = written(tmp_path, OLD, architectures=["LlamaForCausalLM"], rope_theta=5e5, rope_scaling=scaling)
    del scaling["rope_type"]
    assert read_spec(llama).rope["full_attention"] == Rope("llama3", 5e5, parameters=scaling)
    assert read_spec(written(tmp_path, OLD, rope_theta="absent")).rope["full_attention"].theta == 10000.0


def test_both_files_end_tokens_count(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert read_spec(written(tmp_path, OLD)).eos_token_ids == (5, 7)


def test_defaults_of_families(tmp_path: Path) -> None:
    bare = {key: value for key, value in OLD.items() if key != "max_position_embeddings"}
    spec = read_spec(written(tmp_path, bare, architectures="absent", model_type="qwen3", tie_word_embeddings="absent"))
    assert (spec.family, spec.head_dim, spec.kv_heads, spec.max_positions, spec.tied) == (
        "qwen3",
        128,
        4,
        32768,
        False,
    )


MOE: dict[str, Any] = {
    **OLD,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


MIXTRAL: dict[str, Any] = {
    **OLD,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def test_sparse_layers_are_those_of_transformers(tmp_path: Path) -> None:
    """By hand: of 6 layers every second is sparse, 1, 3 and 5, and 3 is taken out."""
    spec = read_spec(written(tmp_path, MOE, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert (spec.experts, spec.experts_per_token, spec.expert_ffn, spec.sparse_layers) == (8, 2, 24, (1, 5))
    assert (spec.norm_topk, spec.qk_norm, spec.ffn) == (False, "head", 96)
    assert read_spec(written(tmp_path, MOE, norm_topk_prob=True)).norm_topk
    dense = read_spec(written(tmp_path, MOE, mlp_only_layers=list(range(6))))
    assert (dense.experts, dense.sparse_layers) == (0, ())
    spec = read_spec(written(tmp_path, MIXTRAL, rms_norm_eps="absent"))
    assert (spec.experts, spec.expert_ffn, spec.norm_topk, spec.norm_eps) == (4, 96, True, 1e-5)


def test_names_of_experts(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path, MOE))
    assert router_tensor(spec, 3) == "model.layers.3.mlp.gate.weight"
    assert expert_tensors(spec, 3, 7)[2] == "model.layers.3.mlp.experts.7.down_proj.weight"
    spec = read_spec(written(tmp_path, MIXTRAL))
    assert router_tensor(spec, 0) == "model.layers.0.block_sparse_moe.gate.weight"
    found = [name.rsplit(".", 2)[1] for name in expert_tensors(spec, 0, 1)]
    assert found == ["w1", "w3", "w2"]  # gate, up, down


def test_gemma_as_older_configs_have_it(tmp_path: Path) -> None:
    gemma = {**OLD, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "tie_word_embeddings": "absent"}
    spec = read_spec(written(tmp_path, gemma, hidden_activation=None, head_dim="absent"))
    assert (spec.activation, spec.norm_plus_one, spec.embedding_scale) == ("gelu_tanh", True, 8.0)
    assert (spec.tied, spec.head_dim) == (True, 256)
    with pytest.raises(ValueError, match="hidden_activation='gelu'"):
        read_spec(written(tmp_path, gemma, hidden_activation="gelu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_experts=8"),
        ({"num_experts": "absent"}, "num_experts must be a positive whole number, found None"),
        ({"moe_intermediate_size": "absent"}, "moe_intermediate_size must be a positive whole number"),
        ({"mlp_only_layers": ["first"]}, "mlp_only_layers=.* must be a list of layer numbers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive whole number"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"num_local_experts": 4}, "num_experts and num_local_experts are two names of one thing and differ"),
        ({"norm_topk_prob": None}, "norm_topk_prob=None is neither true nor false"),
        ({"output_router_logits": True}, "output_router_logits=True is not supported; .*loss of balance"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
    ],
)
def test_what_experts_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, MOE, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 64}, "sliding_window=64 is not supported; only sliding_window=null"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"num_experts": 8}, "num_local_experts and num_experts are two names"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be a positive whole number, found None"),
    ],
)
def test_what_mixtral_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(written(tmp_path, MIXTRAL, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported.*LlamaForCausalLM.*Qwen2",
        ),
        ({"attention_bias": True}, "attention_bias=True is not supported; only attention_bias=false"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"type": "ntk", "factor": 4.0}},
            "rope_scaling: rope_type='ntk' is not supported; .*'default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "needs a positive number for low_freq_factor, high_freq_factor",
        ),
        ({"rope_theta": "big"}, "rope_theta='big' must be a positive number"),
        ({"hidden_size": "absent"}, "hidden_size must be a positive whole number, found None"),
        ({"vocab_size": "67"}, "vocab_size must be a positive whole number, found '67'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, found 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 must divide num_attention_heads=8"),
        ({"torch_dtype": "float8"}, "dtype='float8' is not supported; use float32, bfloat16, float16"),
        ({"model_type": "mistral"}, "model_type='mistral' is not that of architecture Qwen2ForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM", "Custom"]}, "names several"),
        ({"architectures": ["Qwen2Model"]}, "architecture Qwen2Model is not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "must be a list of one name"),
        ({"num_key_value_heads": "absent"}, "num_key_value_heads is not there, for which transformers takes 32"),
        ({"num_key_value_heads": True}, "num_key_value_heads must be a positive whole number, found True"),
        ({"head_dim": 16}, "head_dim=16 is not hidden_size / num_attention_heads=8, which the engine takes"),
        ({"num_attention_heads": 64, "num_key_value_heads": 4}, "head_dim=1 is odd"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is neither true nor false"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a positive number with a decimal point"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be"),
        ({"hidden_act": None}, "hidden_act=None is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; .*drops nothing out"),
        ({"resid_pdrop": 0.1}, "resid_pdrop=0.1 .*drops nothing out"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, "layer_types has 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "as many entries as num_hidden_layers=6"),
        ({"is_causal": False}, "is_causal=False is not supported; only is_causal=true"),
        ({"qkv_bias": False}, "qkv_bias=False is not supported; leave it out, which means True"),
        ({"architectures": ["LlamaForCausalLM"], "qkv_bias": True}, "qkv_bias=True is not .* which means False"),
        ({"logit_scale": 0.25}, "logit_scale=0.25"),
        (
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0 is not known, .* Remove final_logit_softcapping",
        ),
        ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
        ({"per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config"),
        ({"text_config": {"model_type": "qwen2"}}, "text_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors' is not known"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 is not known"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Custom"}}, "auto_map=.* code of the checkpoint's own"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_spec(written(tmp_path, OLD, **change))
    assert str(tmp_path / "config.json") in str(error.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path=.*nowhere is not a folder"):
        read_spec(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_spec(tmp_path)
    with pytest.raises(ValueError, match="must hold a JSON object, found list"):
        read_spec(written(tmp_path, []))


def test_a_saved_model_reads_back_through_transformers(tmp_path: Path) -> None:
    """The sizes used in these tests make a model that transformers itself accepts."""
    assert AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path)).config.vocab_size == SIZES["vocab_size"]


def test_specs_need_no_torch() -> None:
    modules = "aligner.models.read_spec, aligner.trainer.megatron.layout, aligner.reshard.plan.transfer_plan"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
