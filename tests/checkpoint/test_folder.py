"""A checkpoint on disk: read back by safetensors, whole or not there, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from aligner.checkpoint import folder
from aligner.checkpoint.folder import Checksum, DamagedCheckpoint

TENSORS = {
    "fp32": torch.arange(12, dtype=torch.float32),
    "bf16": torch.linspace(-1, 1, 7).bfloat16(),
    "none": torch.empty(0),
    "bytes": torch.arange(256, dtype=torch.uint8),
}


def written(root: Path, step: int, keep: int = 9) -> Path:
    partial = folder.partial_folder(root, step)
    partial.mkdir(parents=True)
    files: dict[str, Checksum] = {
        "state.json": folder.write_checksummed_json(partial / "state.json", {"step": step}),
        "rank-00000.safetensors": folder.write_tensors(partial / "rank-00000.safetensors", TENSORS),
    }
    return folder.publish_checkpoint(root, step, 1, files, keep)


def test_tensors_are_read_back_by_safetensors(tmp_path: Path) -> None:
    size, digest = folder.write_tensors(tmp_path / "file.safetensors", TENSORS)
    content = (tmp_path / "file.safetensors").read_bytes()
    assert (len(content), xxhash.xxh3_128(content).hexdigest()) == (size, digest)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_a_checkpoint_exists_when_it_is_published(tmp_path: Path) -> None:
    partial = folder.partial_folder(tmp_path, 4)
    partial.mkdir()
    folder.write_tensors(partial / "rank-00000.safetensors", TENSORS)
    assert folder.complete(tmp_path) == []
    assert written(tmp_path, 5) == tmp_path / "step-00000005"
    assert folder.complete(tmp_path) == [tmp_path / "step-00000005"]
    manifest = folder.read_manifest(tmp_path / "step-00000005")
    folder.verify(tmp_path / "step-00000005", manifest["files"])


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        written(tmp_path, step, keep=2)
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000010", "step-00000003"]


def test_what_somebody_has_put_into_an_old_one_stays(tmp_path: Path) -> None:
    old = written(tmp_path, 1)
    (old / "policy").mkdir()
    for name in ("notes.md", "policy/eval.json"):
        (old / name).write_text("mine")
    written(tmp_path, 2, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000001.others"}
    assert [(tmp_path / "step-00000001.others" / name).read_text() for name in ("notes.md", "policy/eval.json")] == [
        "mine"
    ] * 2
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    written(tmp_path, 3)
    (tmp_path / "step-00000003" / "left over").touch()
    assert not (written(tmp_path, 3) / "left over").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "manifest", "format"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, 7)
    shard, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[:-1])
        wrong = f"{shard} has {len(content) - 1} bytes, but the manifest says {len(content)}"
    elif damage == "missing":
        shard.unlink()
        wrong = f"{shard} has no bytes, but the manifest says {len(content)}"
    elif damage == "flipped":
        content[-20] ^= 1
        shard.write_bytes(content)
        wrong = f"{shard} is damaged"
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
        wrong = f"{manifest} cannot be read"
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
        wrong = f"{manifest} has format 99; this program reads 1"
    with pytest.raises(DamagedCheckpoint) as error:
        folder.verify(path, folder.read_manifest(path)["files"])
    assert str(error.value).startswith(wrong)
