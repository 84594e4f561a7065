"""Which models vLLM is told to have a class for: as it says itself; and the errors about others, before it is imported."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import PersimmonConfig, XGLMConfig

from aligner.models.read_spec import read_spec
from aligner.rollout.config import RolloutConfig
from aligner.rollout.engines import backend
from aligner.rollout.vllm.architectures import architectures, check_known
from aligner.rollout.vllm.engine import VllmEngine
from aligner.spmd.mesh import Mesh
from tests.models.own_code import CONFIG, save_model
from tools.family_models import write_model

SIZES = {"vocab_size": 64, "max_position_embeddings": 64}
MESH, SETTINGS = Mesh((0,), 1, 1, name="rollout"), RolloutConfig(max_model_len=32)


def test_the_table_is_that_of_the_installed_vllm() -> None:
    from vllm.model_executor.models.registry import _VLLM_MODELS

    known = architectures()
    assert known is not None and len(known) > 300 and known <= _VLLM_MODELS.keys()
    # what is computed from the other tables: models that embed texts
    assert {name for name in _VLLM_MODELS.keys() - known if name.endswith("ForCausalLM")} == set()


def test_own_code_needs_a_class_that_vllm_makes(tmp_path: Path) -> None:
    save_model(tmp_path)
    check_known(read_spec(tmp_path, True))
    auto_map = {name: value for name, value in CONFIG["auto_map"].items() if name != "AutoModel"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto_map}))
    spec = read_spec(tmp_path, True)
    with pytest.raises(ValueError, match=r"no AutoModel, which .*; use rollout\.engine=transformers\."):
        backend("vllm").check(spec, MESH, SETTINGS, True)
    backend("transformers").check(spec, MESH, SETTINGS, True)


def test_a_class_without_replaceable_attention(tmp_path: Path) -> None:
    XGLMConfig(**SIZES, d_model=64, ffn_dim=64, num_layers=1, attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no class for architecture XGLMForCausalLM .*use rollout\.engine=transformers"
    ):
        check_known(read_spec(tmp_path))


def test_the_transformers_backend_takes_what_the_table_lacks(tmp_path: Path) -> None:
    PersimmonConfig(
        **SIZES, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert spec.tensors is not None and spec.tensors.architecture not in (architectures() or ())
    check_known(spec)
    mesh = Mesh((0, 1), tensor=2, name="rollout")
    with pytest.raises(
        ValueError, match=r"rollout\.tensor=2: .* PersimmonForCausalLM has no tensor-parallel plan; use 1\."
    ):
        backend("vllm").check(spec, mesh, SETTINGS, False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_delta_nets_on_a_cpu(dtype: str, tmp_path: Path) -> None:
    write_model("qwen3_next", tmp_path)
    spec, settings = read_spec(tmp_path), replace(SETTINGS, dtype=dtype)
    backend("vllm").check(spec, MESH, settings, False)
    with pytest.raises(ValueError, match=r"gated delta nets .*; use rollout\.engine=transformers"):
        backend("vllm").check(spec, MESH, settings, True)


def test_a_convolution_that_vllm_repacks_is_refused(group: dist.ProcessGroup, tmp_path: Path) -> None:
    """Written as its loader expects it, an engine would answer with log-probabilities that are off by 30."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("vLLM repacks them where a CPU has instructions for bfloat16")
    write_model("qwen3_next", tmp_path)
    settings = replace(SETTINGS, dtype="bfloat16", max_num_seqs=4, kv_cache_mib=16)
    engine = VllmEngine(tmp_path, group, "test", settings, torch.device("cpu"))
    try:
        with pytest.raises(ValueError, match=r"conv1d.* repacks the weights of a convolution .*use rollout\.engine=tr"):
            engine.weights.pieces()
    finally:
        engine.close()


@pytest.mark.parametrize(("length", "works"), [(48, True), (49, False)])
def test_windows_that_vllm_takes_for_wider_ones(length: int, works: bool, tmp_path: Path) -> None:
    write_model("cohere2", tmp_path)  # a window of 48 tokens
    spec, settings = read_spec(tmp_path), replace(SETTINGS, max_model_len=length)
    message = r"rollout\.max_model_len=49: .*one token more than .* use 48 or less, or rollout\.engine=transformers"
    with nullcontext() if works else pytest.raises(ValueError, match=message):
        backend("vllm").check(spec, MESH, settings, True)
    backend("transformers").check(spec, MESH, replace(settings, engine="transformers"), True)
