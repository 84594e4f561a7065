"""A checkpoint on disk: a folder that has its name only when it is complete, with a checksum of every file in it.

step-00000120/
    manifest.json               {format, step, world, seconds to write, files: {name: [bytes, XXH3]}}
    state.json                  what all ranks know
    rank-00000.json             what only this rank knows, and which regions its tensors hold
    rank-00000.safetensors      its tensors
    policy/                     configuration and tokenizer: a model to start from, or to convert; of each role that learns
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
"""Bytes that are hashed and written at a time: they are hashed where the cache still has them."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}

Sum = tuple[int, str]
"""Bytes of a file, and their XXH3 in hexadecimal digits."""


class Broken(ValueError):
    """A checkpoint that is not what was written; the message names the file."""


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where it is written."""
    return root / f".step-{step:08d}.partial"


def complete(root: Path) -> list[Path]:
    """The checkpoints there are, newest first."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def rank_file(rank: int, suffix: str) -> str:
    """A rank's own file: suffix "json" or "safetensors"."""
    return f"rank-{rank:05d}.{suffix}"


def write_bytes(file: Path, content: bytes) -> Sum:
    """Write a small file through to the disk."""
    return _write(file, [content])


def write_json(file: Path, value: object) -> Sum:
    """Write a JSON file through to the disk."""
    return write_bytes(file, json.dumps(value).encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor], tick: Callable[[], None] = lambda: None) -> Sum:
    """Write host tensors as safetensors, through to the disk; each byte is hashed as it is written.

    Args:
        tick: called after each few MiB.
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


def _write(file: Path, parts: Sequence[Any], tick: Callable[[], None] = lambda: None) -> Sum:
    digest, written = xxhash.xxh3_128(), 0
    with file.open("wb", buffering=0) as out:
        for part in parts:
            whole = memoryview(part)
            for start in range(0, len(whole), CHUNK):
                chunk = whole[start : start + CHUNK]
                digest.update(chunk)
                while chunk:  # a disk that is nearly full takes a part
                    taken = out.write(chunk)
                    written, chunk = written + taken, chunk[taken:]
                tick()
        os.fsync(out.fileno())
    return written, digest.hexdigest()


def publish(
    root: Path, step: int, world: int, files: Mapping[str, Sum], keep: int, more: Mapping[str, Any] | None = None
) -> Path:
    """Give the complete folder its name; then remove all but the newest `keep` checkpoints.

    At no moment does a half-written checkpoint stand under a name that `complete` finds.

    Args:
        world: ranks that have written it.
        more: further entries of the manifest.
    """
    partial, final = partial_folder(root, step), step_folder(root, step)
    manifest = {"format": FORMAT, "step": step, "world": world, **(more or {}), "files": dict(files)}
    write_json(partial / MANIFEST, manifest)
    replace(partial, final)
    for old in complete(root)[keep:]:
        remove(old)
    return final


def remove(old: Path) -> None:
    """Remove a checkpoint. Files that somebody else has put there stay, in a folder beside it: step-00000120.others."""
    hidden = old.with_name(f".{old.name}.old")  # nobody takes what is half removed for a checkpoint
    try:
        ours = {MANIFEST, *read_json(old / MANIFEST)["files"]}
        there = [path for path in old.rglob("*") if not path.is_dir() or path.is_symlink()]
        others = [path.relative_to(old) for path in there if str(path.relative_to(old)) not in ours]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: it cannot be told
        others = []
    shutil.rmtree(hidden, ignore_errors=True)
    old.rename(hidden)
    for name in others:
        to = old.with_name(f"{old.name}.others") / name
        to.parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).rename(to)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what a job that was killed had half written or half removed."""
    for left in root.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint consists of; every file is there and has its size.

    Raises:
        Broken: it does not, or the manifest cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
        version = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Broken(f"{folder / MANIFEST} cannot be read: {error!r}") from None
    if version != FORMAT:
        raise Broken(f"{folder / MANIFEST} has format {version}; this program reads {FORMAT}")
    for name, (size, _) in files.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            raise Broken(f"{folder / name} has {'no' if there is None else there} bytes, the manifest says {size}")
    return {**found, "files": files}


def verify(folder: Path, files: Mapping[str, Sum], tick: Callable[[], None] = lambda: None) -> None:
    """Raises Broken, naming the first of `files` that does not hold what was written."""
    for name, (_, expected) in files.items():
        digest = xxhash.xxh3_128()
        with (folder / name).open("rb") as file:
            for chunk in iter(lambda: file.read(CHUNK), b""):
                digest.update(chunk)
                tick()
        if digest.hexdigest() != expected:
            raise Broken(f"{folder / name} is damaged: its checksum is {digest.hexdigest()}, not {expected}")


def read_json(file: Path) -> Any:
    """A JSON file of a verified checkpoint."""
    return json.loads(file.read_text(encoding="utf-8"))
