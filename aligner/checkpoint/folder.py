"""The checkpoint format: a folder that is renamed to its final name when complete, with a checksum of every file.

step-00000120/
    manifest.json               {format, step, world, seconds to write, files: {name: [bytes, XXH3]}}
    state.json                  state shared by all ranks
    rank-00000.json             state of this rank, and the regions of its tensors
    rank-00000.safetensors      its tensors
    policy/                     model configuration and tokenizer of each trained role, to start from or to convert
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from aligner.models.hf_folder import publish as replace

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")
CHUNK = 8 << 20
"""Bytes hashed and written at a time, small enough to be still in the CPU cache when written."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}

Checksum = tuple[int, str]
"""(size of a file in bytes, its XXH3-128 in hexadecimal)."""


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete or damaged; the message names the file."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """The temporary folder in which a step's checkpoint is written."""
    return root / f".step-{step:08d}.partial"


def complete(root: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    folders = [path for path in root.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def rank_file(rank: int, suffix: str) -> str:
    """Name of a rank's file; suffix "json" or "safetensors"."""
    return f"rank-{rank:05d}.{suffix}"


def write_bytes(file: Path, content: bytes) -> Checksum:
    """Write a small file and fsync."""
    return _write(file, [content])


def write_checksummed_json(file: Path, value: object) -> Checksum:
    """Write a JSON file and fsync."""
    return write_bytes(file, json.dumps(value).encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor], tick: Callable[[], None] = lambda: None) -> Checksum:
    """Write contiguous CPU tensors as safetensors and fsync; the checksum is computed while writing.

    Args:
        tick: called after every CHUNK bytes.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", f"{name} is not a contiguous host tensor"
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    bodies = (tensor.view(-1).view(torch.uint8).numpy().data for tensor in tensors.values())
    return _write(file, [struct.pack("<Q", len(text)), text, *bodies], tick)


def _write(file: Path, parts: Sequence[Any], tick: Callable[[], None] = lambda: None) -> Checksum:
    digest, written = xxhash.xxh3_128(), 0
    with file.open("wb", buffering=0) as target:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                digest.update(chunk)
                while chunk:  # a nearly full disk may accept only a part
                    count = target.write(chunk)
                    written, chunk = written + count, chunk[count:]
                tick()
        os.fsync(target.fileno())
    return written, digest.hexdigest()


def publish_checkpoint(
    root: Path, step: int, world: int, files: Mapping[str, Checksum], keep: int, more: Mapping[str, Any] | None = None
) -> Path:
    """Rename the complete partial folder to its final name, then remove all but the newest `keep` checkpoints.

    Atomic: a partially written checkpoint never has a name that `complete` finds.

    Args:
        world: number of ranks that wrote it.
        files: all files with their checksums.
        more: further entries of the manifest.
    """
    partial, final = partial_folder(root, step), step_folder(root, step)
    manifest = {"format": FORMAT, "step": step, "world": world, **(more or {}), "files": dict(files)}
    write_checksummed_json(partial / MANIFEST, manifest)
    replace(partial, final)
    for old in complete(root)[keep:]:
        remove(old)
    return final


def remove(old: Path) -> None:
    """Remove a checkpoint. Files in it that are not its own are moved to a folder beside it: step-00000120.others."""
    hidden = old.with_name(f".{old.name}.old")  # renamed first, so that a partially removed one is not found
    try:
        own_files = {MANIFEST, *read_json(old / MANIFEST)["files"]}
        files = [path for path in old.rglob("*") if not path.is_dir() or path.is_symlink()]
        others = [path.relative_to(old) for path in files if str(path.relative_to(old)) not in own_files]
    except (OSError, ValueError, KeyError, TypeError):  # damaged manifest: unknown
        others = []
    shutil.rmtree(hidden, ignore_errors=True)
    old.rename(hidden)
    for name in others:
        to = old.with_name(f"{old.name}.others") / name
        to.parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).rename(to)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove partially written or partially removed checkpoints of a killed job."""
    for left in root.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check that every file exists with its size.

    Raises:
        DamagedCheckpoint: a file is missing or has another size, or the manifest cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read: {error!r}") from None
    if version != FORMAT:
        raise DamagedCheckpoint(f"{folder / MANIFEST} has format {version}; this program reads {FORMAT}")
    for name, (size, _) in files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            raise DamagedCheckpoint(
                f"{folder / name} has {'no' if actual is None else actual} bytes, but the manifest says {size}"
            )
    return {**manifest, "files": files}


def verify(folder: Path, files: Mapping[str, Checksum], tick: Callable[[], None] = lambda: None) -> None:
    """Raises DamagedCheckpoint, naming the first of `files` whose checksum differs. `tick` is called after every CHUNK bytes."""
    for name, (_, expected) in files.items():
        digest = xxhash.xxh3_128()
        with (folder / name).open("rb") as file:
            for chunk in iter(lambda: file.read(CHUNK), b""):
                digest.update(chunk)
                tick()
        if digest.hexdigest() != expected:
            raise DamagedCheckpoint(f"{folder / name} is damaged: its checksum is {digest.hexdigest()}, not {expected}")


def read_json(file: Path) -> Any:
    """A JSON file of a verified checkpoint."""
    return json.loads(file.read_text(encoding="utf-8"))
