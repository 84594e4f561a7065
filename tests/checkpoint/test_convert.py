"""tools/convert.py: any layout to any other and back to Hugging Face files, bit for bit; and how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aligner.checkpoint.convert import convert
from aligner.models.checkpoint import read_into
from aligner.models.hf_folder import write_rest
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.models.tensors import logical_tensors
from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import allocate
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout, MegatronSharding
from tests import fork_server
from tests.models.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
CUTS = {
    "llama": [MegatronSharding(tensor=2, pipeline=2), MegatronSharding(tensor=4)],
    "qwen2-tied": [MegatronSharding(pipeline=4), MegatronSharding(tensor=2)],
    "qwen3-moe": [MegatronSharding(expert=2), MegatronSharding(tensor=2, pipeline=2, expert=2)],
    "mixtral": [MegatronSharding(tensor=2, expert_tensor=2), MegatronSharding(expert=4, pipeline=2)],
}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", CUTS)
def test_through_two_layouts_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "model", max_shard_size="40KB")
    (model / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    original, spec = weights(model), read_spec(model)
    at = model
    for number, cut in enumerate(CUTS[name]):
        row = convert(at, tmp_path / f"cut{number}", cut)
        at = tmp_path / f"cut{number}"
        layout = cut.layout(spec, "float32")
        assert row.local_bytes == sum(piece.bytes for rank in layout.ranks for piece in layout.layout(rank))
        assert row.checksummed and not row.moved_bytes
        assert len(list(at.glob("rank-*.safetensors"))) == len(layout.ranks)
    convert(at, tmp_path / "back", None, file_bytes=30_000)
    found = weights(tmp_path / "back")
    assert {name: found[name].shape for name in found} == {name: original[name].shape for name in logical_tensors(spec)}
    assert all(torch.equal(found[name], original[name]) for name in found)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    convert(at, tmp_path / "half", None, "bfloat16")
    found = weights(tmp_path / "half")
    assert all(torch.equal(found[name], original[name].bfloat16()) for name in found)
    assert read_spec(tmp_path / "half").dtype == "bfloat16"


def test_a_folder_of_shards_is_read_into_any_layout(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    convert(model, tmp_path / "cut", MegatronSharding(tensor=2, pipeline=2))
    mesh = Mesh((0, 1, 2, 3), tensor=4, name="policy")
    for rank in mesh.ranks:
        found = []
        for folder in (model, tmp_path / "cut"):
            layout = MegatronLayout(read_spec(folder), mesh, "float32").layout(rank)
            tensors = allocate(layout, torch.device("cpu"))
            read = read_into(read_spec(folder), layout, TensorWeights(tensors, layout).view)
            assert read == sum(piece.bytes for piece in layout)
            found.append(tensors)
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tool = [sys.executable, str(ROOT / "tools" / "convert.py")]
    return fork_server.run([*tool, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    model = save_tiny("qwen3", tmp_path / "model")
    done = run(model, tmp_path / "cut", "--layout", "tensor=2,pipeline=2", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cut" / "shards.json").read_text())["tensor"] == 2
    assert "regions proven" in done.stdout
    # A cut that does not fit, a size that there is not, a folder that is no checkpoint, its own folder.
    for arguments, said in (
        ((model, tmp_path / "x", "--layout", "tensor=3"), "layout.tensor=3"),
        (
            (model, tmp_path / "x", "--layout", "data=2"),
            "'data=2' is not understood; use huggingface, or sizes of tensor",
        ),
        ((tmp_path / "none", tmp_path / "x"), "is not a folder"),
        ((model, model), "write to another folder"),
        ((model, tmp_path / "x", "--file-bytes", "0"), "--file-bytes 0 leaves no room for a tensor; use 1 or more"),
        ((model, tmp_path / "model" / "config.json" / "x"), "Not a directory"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()


def test_files_of_another_size_and_type(tmp_path: Path) -> None:
    """Hugging Face to Hugging Face, by the bytes of the files: transformers reads the same weights."""
    model = save_tiny("qwen2-tied", tmp_path / "model")
    original = weights(model)
    done = run(model, tmp_path / "small", "--file-bytes", "20000")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in original.values())
    assert len(files) > 3
    for file in files:
        held = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(held) <= 20000 or len(held) == 1, "a tensor is never split"
    assert largest < 20000
    assert run(tmp_path / "small", tmp_path / "half", "--dtype", "float16").returncode == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert found.dtype == torch.float16
    assert all(torch.equal(found.state_dict()[name], tensor.half()) for name, tensor in original.items())
    assert [file.name for file in (tmp_path / "half").glob("*.safetensors")] == ["model.safetensors"]


def test_a_type_that_cannot_hold_the_weights_is_refused(tmp_path: Path) -> None:
    model = save_tiny("qwen3", tmp_path / "model")
    changed = weights(model)
    changed["model.layers.1.mlp.up_proj.weight"][3, 4] = 65520.0  # the least that float16 rounds to infinity
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    done = run(model, tmp_path / "half", "--dtype", "float16")
    assert done.returncode == 2 and not (tmp_path / "half").exists()
    assert "model.layers.1.mlp.up_proj.weight has values that float16 cannot hold" in done.stderr
    changed["model.layers.1.mlp.up_proj.weight"][3, 4] = 65519.0
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    assert run(model, tmp_path / "half", "--dtype", "float16").returncode == 0


def test_broken_shards_are_named(tmp_path: Path) -> None:
    model = save_tiny("qwen3", tmp_path / "model")
    whole = tmp_path / "cut"
    convert(model, whole, MegatronSharding(tensor=2))

    def broken(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    lacking = broken("lacking")
    (lacking / "rank-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks rank-00001\.safetensors; convert"):
        convert(lacking, tmp_path / "out", None)
    garbled = broken("garbled")
    (garbled / "shards.json").write_text('{"tensor": 2}')
    with pytest.raises(ValueError, match=r"shards\.json is not valid"):
        convert(garbled, tmp_path / "out", None)
    short = broken("short")
    content = (short / "rank-00000.safetensors").read_bytes()
    (short / "rank-00000.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors cannot be read.*incomplete"):
        convert(short, tmp_path / "out", None)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "cut", "lacking", "garbled", "short"}


@pytest.mark.parametrize(
    ("generation", "ends", "written"),
    [
        ({"eos_token_id": 1, "top_k": 9}, (1,), {"eos_token_id": 1, "top_k": 9}),
        ({"eos_token_id": [7, 1], "top_k": 9}, (1, 7, 5), {"eos_token_id": [7, 1, 5], "top_k": 9}),
        ({"top_k": 9}, (1,), {"eos_token_id": [1], "top_k": 9}),
        (None, (1,), None),  # transformers and vLLM then read config.json
        (None, (1, 5), {"eos_token_id": [1, 5], "pad_token_id": 3}),
    ],
)
def test_a_written_folder_names_every_end_token(
    tmp_path: Path, generation: dict[str, Any] | None, ends: tuple[int, ...], written: dict[str, Any] | None
) -> None:
    """What the model's own generation_config.json has stays; what was trained to end turns joins it."""
    folder, file = save_tiny("qwen2-tied", tmp_path / "model"), tmp_path / "model" / "generation_config.json"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 3}))
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    (tmp_path / "out").mkdir()
    write_rest(tmp_path / "out", replace(read_spec(folder), eos_token_ids=ends), "float32", {})
    found = tmp_path / "out" / "generation_config.json"
    assert (json.loads(found.read_text()) if found.is_file() else None) == written
    scored = tmp_path / "scored"
    scored.mkdir()
    write_rest(scored, with_scalar_head(replace(read_spec(folder), eos_token_ids=(*ends, 9))), "float32", {})
    copied = scored / "generation_config.json"
    assert (json.loads(copied.read_text()) if copied.is_file() else None) == generation, "a score has no end"
