"""Models with a scalar head: read from both kinds of folder, written as transformers' classification models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from aligner.checkpoint.convert import convert
from aligner.data.column_addition import write_tokenizer
from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.families import FAMILIES
from aligner.models.read_spec import read_spec
from aligner.models.spec import Head, ModelSpec, with_scalar_head
from aligner.models.tensors import logical_tensors
from aligner.models.verify_checkpoint import check_weights
from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import allocate
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout, MegatronSharding
from tests.models.tiny import KINDS, MODELS, SIZES, save_tiny, stored_tensors

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 23).view(2, 10)


def classifier(name: str, folder: Path, **settings: Any) -> Path:
    """A classification model of transformers, of one label, with random parameters."""
    kind, own = KINDS[name]
    torch.manual_seed(len(name))
    config = kind(
        **{**SIZES, "tie_word_embeddings": "tied" in name, **own, "num_labels": 1, "pad_token_id": 0, **settings}
    )
    model = AutoModelForSequenceClassification.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return folder


def held(spec: ModelSpec, rank: int = 0, **sizes: int) -> dict[str, Tensor]:
    """What a rank's storages hold after reading."""
    ranks = tuple(range(sizes.get("tensor", 1) * sizes.get("pipeline", 1)))
    layout = MegatronLayout(spec, Mesh(ranks, **sizes), "float32").layout(rank)
    tensors = allocate(layout, CPU)
    for tensor in tensors.values():
        tensor.fill_(7.0)
    read_into(spec, layout, TensorWeights(tensors, layout).view)
    return tensors


def write(spec: ModelSpec, out: Path) -> Path:
    layout = MegatronLayout(spec, Mesh((0,)), "float32").layout(0)
    tensors = allocate(layout, CPU)
    source = TensorWeights(tensors, layout).view
    read_into(spec, layout, source)
    export_checkpoint(0, {0: layout}, source, None, out, spec, "float32")
    return out


def logits(folder: Path) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.num_labels == 1
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_a_classifier_of_transformers_goes_through_bit_exactly(name: str, tmp_path: Path) -> None:
    folder = classifier(name, tmp_path / "model")
    spec, old = read_spec(folder), stored_tensors(folder)
    assert (spec.head, spec.stored_head, spec.tied) == (Head.SCALAR, Head.SCALAR, False)
    assert with_scalar_head(spec) == spec
    assert logical_tensors(spec) == {key: tuple(value.shape) for key, value in old.items()}
    check_weights(spec)
    new = stored_tensors(write(spec, tmp_path / "out"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert torch.equal(logits(folder), logits(tmp_path / "out"))
    for rank in range(4):  # whole on every tensor rank of the last stage, nowhere else
        found = held(spec, rank, tensor=2, pipeline=2)
        if rank < 2:
            assert "output_layer.weight" not in found
        else:
            assert torch.equal(found["output_layer.weight"].view(1, -1), old["score.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "mixtral"])
def test_a_language_model_gets_a_head_of_zeros(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path / "model")
    write_tokenizer(folder)
    spec, old = with_scalar_head(read_spec(folder)), stored_tensors(folder)
    check_weights(spec)  # the output layer in the folder is no stranger
    assert not held(spec, 1, pipeline=2)["output_layer.weight"].any()
    new = stored_tensors(write(spec, tmp_path / "out"))
    assert new.keys() == old.keys() - {"lm_head.weight"} | {"score.weight"}
    assert new["score.weight"].shape == (1, 32) and not new["score.weight"].any()
    assert all(torch.equal(old[key], new[key]) for key in new if key != "score.weight")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[spec.family].classifier]
    assert config["pad_token_id"] == 0  # config.json has none, the tokenizer's <pad> is 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert logits(tmp_path / "out").tolist() == [[0.0], [0.0]]
    again = read_spec(tmp_path / "out")
    assert (again.head, again.stored_head) == (Head.SCALAR, Head.SCALAR)


def test_shards_keep_the_head(tmp_path: Path) -> None:
    folder = classifier("qwen3-tied", tmp_path / "model")
    convert(folder, tmp_path / "cut", MegatronSharding(tensor=2, pipeline=2))
    convert(tmp_path / "cut", tmp_path / "back", None)
    old, new = stored_tensors(folder), stored_tensors(tmp_path / "back")
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    language = save_tiny("llama", tmp_path / "language")
    convert(language, tmp_path / "language_cut", MegatronSharding(pipeline=2))
    found = held(with_scalar_head(read_spec(tmp_path / "language_cut")))
    assert not found["output_layer.weight"].any()
    norm = stored_tensors(language)["model.norm.weight"]
    assert torch.equal(found["decoder.final_layernorm.weight"], norm)


@pytest.mark.parametrize("labels", [2, 3])
def test_more_than_one_label_is_refused(labels: int, tmp_path: Path) -> None:
    folder = classifier("llama", tmp_path, num_labels=labels)
    with pytest.raises(
        ValueError, match=rf"config\.json: num_labels={labels} is not supported.*use a model with num_labels=1"
    ):
        read_spec(folder)


def test_a_missing_or_strange_tensor_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    labels = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(ValueError, match=r"has a tensor lm_head\.weight which its config\.json does not declare"):
        check_weights(read_spec(folder))
