"""Checkpoints of transformers, read into TP2 x PP2 and written back: bit-exact, loadable, nothing read in vain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.region import Layout
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout
from tests.conftest import Ranks
from tests.models.tiny import MODELS, save_tiny, stored_tensors

CPU = torch.device("cpu")


def layout_of(spec: ModelSpec, rank: int, tensor: int, pipeline: int, dtype: str = "float32") -> Layout:
    return MegatronLayout(spec, Mesh(tuple(range(tensor * pipeline)), tensor, pipeline), dtype).layout(rank)


def read(path: Path, layout: Layout) -> tuple[dict[str, Tensor], int]:
    tensors = allocate(layout, CPU)
    return tensors, read_into(read_spec(path), layout, TensorWeights(tensors, layout).view)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_each_rank_reads_its_own_regions_and_no_more(name: str, shard: str, tmp_path: Path) -> None:
    path = save_tiny(name, tmp_path, max_shard_size=shard)
    hf = stored_tensors(path)
    assert (path / "model.safetensors.index.json").exists() == (shard == "20KB")
    spec = read_spec(path)
    total = 0
    for rank in range(4):
        layout = layout_of(spec, rank, 2, 2)
        tensors, read_bytes = read(path, layout)
        assert read_bytes == sum(piece.bytes for piece in layout)
        total += read_bytes
        for piece in layout:
            box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
            assert torch.equal(strided_view(tensors[piece.storage], piece), hf[piece.name][box])
    whole = sum(value.numel() * 4 for value in hf.values())
    uncut = ("norm.weight", "o_proj.bias", "down_proj.bias", ".gate.weight")  # the last are routers
    copies = sum(value.numel() * 4 for key, value in hf.items() if key.endswith(uncut))
    second_embedding = spec.vocab * spec.hidden * 4 if spec.tied else 0
    assert total == whole + copies + second_embedding  # the uncut on both tensor ranks, a tied embedding on both ends


def test_values_are_cast_to_the_storage(tmp_path: Path) -> None:
    path = save_tiny("qwen3", tmp_path)
    layout = layout_of(read_spec(path), 0, 1, 1, "bfloat16")
    tensors, read_bytes = read(path, layout)
    assert tensors["decoder.final_layernorm.weight"].dtype == torch.bfloat16
    expected = load_file(path / "model.safetensors")["model.norm.weight"].bfloat16()
    assert torch.equal(tensors["decoder.final_layernorm.weight"], expected)
    assert read_bytes == 2 * sum(piece.bytes for piece in layout)  # the file is fp32


EXPORT = "tests.models.export_on_ranks"
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, by name."""
    folder = tmp_path_factory.mktemp("export") / "models"
    for name in MODELS:
        save_tiny(name, folder / name)
        (folder / name / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact_and_loads(ranks: Ranks, models: Path, tmp_path: Path, name: str, dtype: str) -> None:
    """Through four real ranks, TP2 x PP2."""
    folder = tmp_path / f"{name}-{dtype}"
    rows = ranks(4).run(f"{EXPORT}:export", models / name, dtype, folder)
    assert list(tmp_path.iterdir()) == [folder], "nothing but the checkpoint is left"
    original = load_file(models / name / "model.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    written = {key: value for file in files for key, value in load_file(file).items()}
    assert set(written) == set(original)
    assert all(torch.equal(written[key], original[key].to(getattr(torch, dtype))) for key in original)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in written.values())
    assert len(files) == 4 if dtype == "bfloat16" else len(files) >= 4
    assert sum(row["reshard_moved_bytes"] for row in rows) == sum(row["reshard_minimum_bytes"] for row in rows)
    shares = [row["reshard_received_bytes"] + row["reshard_local_bytes"] for row in rows]
    assert sum(shares) == index["metadata"]["total_size"]
    assert max(shares) - min(shares) <= max(value.numel() * value.element_size() for value in written.values())

    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert (folder / "tokenizer.json").read_text() == (models / name / "tokenizer.json").read_text()
    assert (folder / "generation_config.json").is_file()
    before = AutoModelForCausalLM.from_pretrained(models / name, dtype=getattr(torch, dtype)).eval()
    after = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert after.dtype == getattr(torch, dtype)
        assert torch.equal(before(tokens).logits, after(tokens).logits)
    assert read_spec(folder).dtype == dtype


def failed(ranks: Ranks, models: Path, target: Path, unreadable_on: int | None = None) -> list[str]:
    """What each rank is told."""
    errors: list[str] = ranks(4).run(f"{EXPORT}:failed_export", models / "qwen2-tied", target, unreadable_on)
    return errors


def test_a_model_is_not_exported_over_itself(ranks: Ranks, models: Path) -> None:
    first, *others = failed(ranks, models, models / "qwen2-tied")
    assert "is the model.path" in first
    assert all("failed on rank 0; its own error says why" in error for error in others)


def test_a_folder_of_other_things_is_not_replaced(ranks: Ranks, models: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "notes.txt").write_text("keep me")
    first, *others = failed(ranks, models, tmp_path / "occupied")
    assert "is not a checkpoint that could be replaced" in first
    assert all("failed on rank 0" in error for error in others)
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]
    assert (tmp_path / "occupied" / "notes.txt").read_text() == "keep me"


def test_an_error_on_one_rank_is_an_error_on_all(ranks: Ranks, models: Path, tmp_path: Path) -> None:
    errors = failed(ranks, models, tmp_path / "never", unreadable_on=1)
    assert errors[1].startswith("KeyError")
    # Who was to hear from rank 1 names it itself; who was not is told that the step failed.
    for rank in (0, 2, 3):
        assert "rank 1" in errors[rank] or "failed on rank" in errors[rank]
    assert not list(tmp_path.iterdir()), "nothing is left of it"


def test_one_rank_writes_one_file_without_a_group(tmp_path: Path) -> None:
    path = save_tiny("qwen3", tmp_path / "model")
    spec = read_spec(path)
    layout = layout_of(spec, 0, 1, 1)
    tensors, _ = read(path, layout)
    export_checkpoint(5, {5: layout}, TensorWeights(tensors, layout).view, None, tmp_path / "out", spec, "float32")
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors*")} == {"model.safetensors"}
    written, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(path / "model.safetensors")
    assert all(torch.equal(written[key], original[key]) for key in original)


def test_an_older_config_keeps_its_own_dtype_key(tmp_path: Path) -> None:
    path = save_tiny("qwen3", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))
    spec = read_spec(path)
    layout = layout_of(spec, 0, 1, 1)
    tensors, _ = read(path, layout)
    export_checkpoint(0, {0: layout}, TensorWeights(tensors, layout).view, None, tmp_path / "out", spec, "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    whole = save_tiny("qwen2", tmp_path / "whole")
    sharded = save_tiny("qwen2", tmp_path / "sharded", max_shard_size="20KB")
    layout = layout_of(read_spec(whole), 0, 1, 1)
    view = TensorWeights(allocate(layout, CPU), layout).view

    def broken(name: str, of: Path) -> Path:
        return Path(shutil.copytree(of, tmp_path / name))

    none = broken("none", whole)
    (none / "model.safetensors").rename(none / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor .*save_pretrained"):
        read_into(read_spec(none), layout, view)
    short = broken("short", whole)
    content = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read.*incomplete"):
        read_into(read_spec(short), layout, view)
    lacking = broken("lacking", sharded)
    next(iter(sorted(lacking.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ValueError, match=r"names model-.*safetensors, which is not there"):
        read_into(read_spec(lacking), layout, view)
    garbled = broken("garbled", sharded)
    (garbled / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(ValueError, match="is not a valid index"):
        read_into(read_spec(garbled), layout, view)
    headless = broken("headless", whole)
    tensors = load_file(headless / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "lm_head.weight"}, headless / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight.*tie_word_embeddings"):
        read_into(read_spec(headless), layout, view)
    misshapen = broken("misshapen", whole)
    save_file(tensors | {"model.norm.weight": torch.zeros(33)}, misshapen / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(33,\), config.json says \(32,\)"):
        read_into(read_spec(misshapen), layout, view)
