"""A checkpoint whose tensors are not those of its config.json is refused before anything is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aligner.checkpoint.convert import convert
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.tensors import logical_tensors
from aligner.models.verify_checkpoint import check_names, check_weights
from tests.models.tiny import MODELS, save_tiny, stored_tensors


@pytest.mark.parametrize("name", MODELS)
def test_whole_checkpoints_pass(name: str, tmp_path: Path) -> None:
    check_weights(read_spec(save_tiny(name, tmp_path)))


def test_undeclared_tensors_are_named(tmp_path: Path) -> None:
    config = json.loads((save_tiny("llama-bias", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_bias": False}))
    spec = read_spec(tmp_path)
    # by hand: gate, up and down biases of 4 layers
    with pytest.raises(ValueError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.bias and 11 more which its config"):
        check_names(spec, logical_tensors(spec))


def test_copies_of_what_is_known_are_let_be(tmp_path: Path) -> None:
    spec = read_spec(save_tiny("qwen3-tied", tmp_path))
    extra = {"lm_head.weight": torch.zeros(67, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(stored_tensors(tmp_path) | extra, tmp_path / "model.safetensors")
    check_names(spec, logical_tensors(spec))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> ModelSpec:
    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return read_spec(folder)


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2-tied", "gemma-tied"])
@pytest.mark.parametrize("kind", ["noise", "last element", "more rows", "shards", "no number"])
def test_a_tied_output_layer_that_is_another_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        output = tensors[EMBEDDING].clone()
        if kind == "last element":
            output[-1, -1] += 1e-3
        elif kind == "more rows":
            output = torch.cat([output, output[:1]])
        elif kind == "no number":
            output[0, 0] = torch.nan
        else:
            output += 0.02 * torch.randn_like(output)
        tensors[OUTPUT] = output

    spec = rewritten(save_tiny(name, tmp_path / "model"), add)
    if kind == "shards":
        shard(tmp_path / "model", [OUTPUT])
    message = r"tie_word_embeddings=true .* lm_head\.weight that is not model\.embed_tokens\.weight.*tie_word_embeddings=false"
    with pytest.raises(ValueError, match=message):
        check_weights(spec)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    configured(tmp_path / "model", tie_word_embeddings=False)
    if kind != "more rows":  # which are of no model
        check_weights(read_spec(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["same", "wider type", "no numbers"])
def test_a_tied_output_layer_that_is_the_embedding_is_let_be(kind: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        if kind == "no numbers":
            tensors[EMBEDDING][3, 5] = torch.nan
        tensors[OUTPUT] = tensors[EMBEDDING].clone()
        if kind == "wider type":
            tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
            tensors[OUTPUT] = tensors[EMBEDDING].float()

    check_weights(rewritten(save_tiny("qwen3-tied", tmp_path), add))


def shard(folder: Path, second: list[str]) -> None:
    """Cut the one file of weights in two, `second` and the rest, with an index."""
    tensors = stored_tensors(folder)
    (folder / "model.safetensors").unlink()
    of = {name: f"model-0000{1 + (name in second)}-of-00002.safetensors" for name in tensors}
    for file in set(of.values()):
        save_file({name: value for name, value in tensors.items() if of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of}))


def test_an_untied_model_without_output_layer_is_refused(tmp_path: Path) -> None:
    save_tiny("qwen3-tied", tmp_path)
    configured(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight.*tie_word_embeddings"):
        check_weights(read_spec(tmp_path))


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    """Transformers reads model.safetensors, whatever an index beside it says."""
    save_tiny("llama", tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    shard(tmp_path, [OUTPUT])
    check_weights(read_spec(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"two checkpoints: model\.safetensors, which transformers reads"):
        check_weights(read_spec(tmp_path))


def test_what_the_index_hides_is_named(tmp_path: Path) -> None:
    """Other readers load all that the files hold."""
    rewritten(save_tiny("llama", tmp_path), lambda tensors: tensors.update(extra=torch.zeros(2)))
    shard(tmp_path, [OUTPUT])
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {k: v for k, v in found["weight_map"].items() if k != "extra"}}))
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002.safetensors holds extra, which the index .* does not name"
    ):
        check_weights(read_spec(tmp_path))
    found["weight_map"].pop("extra")
    shutil.copyfile(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "other.safetensors")
    index.write_text(json.dumps({"weight_map": found["weight_map"] | {"model.norm.weight": "other.safetensors"}}))
    with pytest.raises(ValueError, match=r"holds .*, which the index beside it (places in|does not name)"):
        check_weights(read_spec(tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "adapter_config.json beside its config.json.*merge_and_unload"),
        ("hf_quant_config.json", "hf_quant_config.json .* quantized"),
    ],
)
def test_files_that_make_another_model_of_it_are_refused(file: str, message: str, tmp_path: Path) -> None:
    spec = read_spec(save_tiny("llama", tmp_path))
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        check_weights(spec)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is an adapter; merge it into its model first"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("model.layers.4.mlp.up_proj.weight", "more layers than num_hidden_layers=4"),
        ("model.layers.0.self_attn.q_proj.bias", "attention_bias or mlp_bias"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "another model's, or config.json lacks a setting"),
        ("score.weight", r'set architectures to \["LlamaForSequenceClassification"\]'),
        ("xlm_head.weight", "tensor xlm_head.weight which its config.json does not declare"),
    ],
)
def test_what_an_undeclared_tensor_would_need_is_said(extra: str, message: str, tmp_path: Path) -> None:
    spec = rewritten(save_tiny("llama", tmp_path), lambda tensors: tensors.update({extra: torch.zeros(1, 32)}))
    with pytest.raises(ValueError, match=message):
        check_weights(spec)


def test_a_scalar_head_beside_an_output_layer_is_asked_about(tmp_path: Path) -> None:
    rewritten(save_tiny("llama", tmp_path), lambda tensors: tensors.update({"score.weight": torch.zeros(1, 32)}))
    configured(tmp_path, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    with pytest.raises(
        ValueError, match=r'lm_head\.weight .* set architectures to \["LlamaForCausalLM"\], else take it out'
    ):
        check_weights(read_spec(tmp_path))


def test_wrong_shapes_and_types_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spec = rewritten(save_tiny("llama", tmp_path / "a"), lambda tensors: tensors.update({name: torch.zeros(47, 32)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(47, 32\), config.json says \(48, 32\)"):
        check_weights(spec)
    whole = torch.zeros(48, 32, dtype=torch.int8)
    spec = rewritten(save_tiny("llama", tmp_path / "b"), lambda tensors: tensors.update({name: whole}))
    with pytest.raises(ValueError, match=rf"{name} is I8; weights must be float32"):
        check_weights(spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, "unsloth_version": "2025.1"},
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "torch_dtype": "float32",
        },
    ],
)
def test_an_export_says_what_the_source_said(changes: dict[str, Any], tmp_path: Path) -> None:
    """Each field as it was, but for the data type, in whichever fields it stood."""
    save_tiny("llama", tmp_path / "model")
    configured(tmp_path / "model", **changes)
    convert(tmp_path / "model", tmp_path / "out", None, "bfloat16")
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out"))
    types = {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in old}
    assert types and new == {**old, **types}
