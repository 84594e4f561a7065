"""Checkpoints on disk as the source of a transfer: Hugging Face files, or one file for each rank of a Megatron layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from aligner.models.hf_folder import files_of_tensors, opened, write_json, write_rest
from aligner.models.spec import ModelSpec
from aligner.models.tensors import logical_tensors
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Box, Piece, whole_tensor
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout

SHARDS = "shards.json"
"""The file that tells a folder of shards from a Hugging Face checkpoint."""
TRAINING = "training.json"
"""The file that tells a role of a training checkpoint."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Stored(Protocol):
    """An open checkpoint."""

    bytes_read: int
    """Bytes of weights looked at so far."""

    def layout(self, names: Iterable[str]) -> list[Piece]:
        """The pieces of these tensors; ValueError where one is missing, misshapen or of an unknown data type."""

    def view(self, piece: Piece) -> Tensor:
        """The elements of a piece, or of a crop of one, as they are on the disk."""


@contextmanager
def open_stored(spec: ModelSpec) -> Iterator[Stored]:
    """The checkpoint in the model's folder: of the first kind in `KINDS` whose file is there, else Hugging Face files."""
    found = next((kind for file, kind in KINDS.items() if (Path(spec.path) / file).is_file()), _HuggingFace)
    with ExitStack() as stack:
        yield found(spec, stack)


class _Files:
    """Safetensors files, each opened when it is first asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, safe_open] = {}
        self.bytes_read = 0

    def __getitem__(self, file: Path) -> safe_open:
        if file not in self._open:
            self._open[file] = self._stack.enter_context(opened(file))
        return self._open[file]


class _HuggingFace(_Files):
    def __init__(self, spec: ModelSpec, stack: ExitStack) -> None:
        super().__init__(stack)
        self._folder, self._shapes = Path(spec.path), logical_tensors(spec)
        self._files = files_of_tensors(self._folder)

    def layout(self, names: Iterable[str]) -> list[Piece]:
        return [self._piece(name) for name in names]

    def view(self, piece: Piece) -> Tensor:
        file = self._files[piece.storage]
        try:
            if not piece.size:  # a slice of no dimensions is not a slice to safetensors
                found = self[file].get_tensor(piece.storage)
            else:
                box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
                found = self[file].get_slice(piece.storage)[box]
        except SafetensorError as error:
            raise ValueError(f"{file}: {piece.name}{piece.box} cannot be read: {error}") from error
        self.bytes_read += piece.bytes
        return found

    def _piece(self, name: str) -> Piece:
        if name not in self._files:
            raise ValueError(
                f"{self._folder} has no tensor {name}; its weights do not fit its config.json "
                "(architectures, num_hidden_layers and tie_word_embeddings decide which tensors there are)."
            )
        file = self._files[name]
        try:
            stored = self[file].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{file} has no tensor {name}, which its index says it has: {error}") from error
        shape = tuple(stored.get_shape())
        if shape != self._shapes[name]:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json says {self._shapes[name]}.")
        if stored.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{file}: {name} is {stored.get_dtype()}; weights must be {', '.join(_DTYPES.values())}: convert them "
                "with transformers: AutoModelForCausalLM.from_pretrained(..., dtype=...).save_pretrained(...)."
            )
        return whole_tensor(name, shape, _DTYPES[stored.get_dtype()])


@dataclass(frozen=True)
class Cut:
    """How a folder of shards is cut: parallel sizes as in placement.policy. There are no data-parallel copies in it."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def side(self, spec: ModelSpec, dtype: str) -> MegatronLayout:
        """What each of the folder's files holds; ValueError where the model cannot be cut so."""
        ranks = self.pipeline * max(self.tensor, self.expert * self.expert_tensor)
        mesh = Mesh(tuple(range(ranks)), **asdict(self), name="layout")
        return MegatronLayout(spec, mesh, dtype)


def shard_file(rank: int) -> str:
    """The file of one rank: its storages, flat, under Megatron's parameter names."""
    return f"rank-{rank:05d}.safetensors"


def write_cut(folder: Path, cut: Cut, dtype: str) -> None:
    """Mark `folder` as shards, cut so."""
    write_json(folder / SHARDS, {"dtype": dtype, **asdict(cut)})


def read_cut(folder: Path) -> tuple[Cut, str]:
    """How the shards in `folder` are cut, and their data type."""
    try:
        found: dict[str, Any] = json.loads((folder / SHARDS).read_text(encoding="utf-8"))
        dtype = found.pop("dtype")
        if set(found) != {field.name for field in fields(Cut)} or dtype not in _DTYPES.values():
            raise ValueError(f"its keys or its dtype {dtype!r} are not what tools/convert.py writes")
        return Cut(**{name: int(size) for name, size in found.items()}), dtype
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / SHARDS} is not valid: {error}; convert the checkpoint again.") from error


class _Shards(_Files):
    def __init__(self, spec: ModelSpec, stack: ExitStack) -> None:
        super().__init__(stack)
        self._folder = Path(spec.path)
        cut, dtype = read_cut(self._folder)
        self._side = cut.side(spec, dtype)
        missing = [rank for rank in self._side.ranks if not (self._folder / shard_file(rank)).is_file()]
        if missing:
            raise ValueError(f"{self._folder} lacks {shard_file(missing[0])}; convert the checkpoint again.")

    def layout(self, names: Iterable[str]) -> list[Piece]:
        """Each region once, from the first rank that holds it."""
        found: dict[tuple[str, Box], Piece] = {}
        for name in names:
            for piece, ranks in self._side.holders(name):
                found.setdefault((name, piece.box), replace(piece, storage=f"{ranks[0]}:{piece.storage}"))
        return list(found.values())

    def view(self, piece: Piece) -> Tensor:
        rank, _, storage = piece.storage.partition(":")
        file = self._folder / shard_file(int(rank))
        try:
            found = self[file].get_tensor(storage)  # mapped, not read
        except SafetensorError as error:
            raise ValueError(f"{file} has no {storage}: {error}; convert the checkpoint again.") from error
        self.bytes_read += piece.bytes
        return strided_view(found, piece)


def describe_training(spec: ModelSpec, role: str) -> dict[str, bytes]:
    """The small files that make a role's folder inside a training checkpoint one to start from, and to convert."""
    with TemporaryDirectory() as folder:
        write_rest(Path(folder), spec, "float32", {})
        found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return {**found, TRAINING: json.dumps({"role": role}).encode()}


class _Training(_Files):
    """A role of a training checkpoint: step-00000050/policy. Its fp32 weights are in the files of the ranks, above it."""

    def __init__(self, spec: ModelSpec, stack: ExitStack) -> None:
        super().__init__(stack)
        self._folder = Path(spec.path).resolve()
        self._pieces: dict[str, list[Piece]] = {}
        try:
            key = f"{json.loads((self._folder / TRAINING).read_text())['role']}/param"
            ranks = sorted(self._folder.parent.glob("rank-*.json"))
            for number, file in enumerate(ranks):
                for name, lo, size, tensor, offset, stride in json.loads(file.read_text())["tensors"].get(key, ()):
                    piece = Piece(name, tuple(lo), tuple(size), f"{number}:{tensor}", offset, tuple(stride), "float32")
                    self._pieces.setdefault(name, []).append(piece)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._folder} cannot be read as a part of a training checkpoint: {error!r}.") from None

    def layout(self, names: Iterable[str]) -> list[Piece]:
        missing = [name for name in names if name not in self._pieces]
        if missing:
            raise ValueError(f"{self._folder.parent} has no part of {missing[0]}.")
        return [piece for name in names for piece in self._pieces[name]]

    def view(self, piece: Piece) -> Tensor:
        rank, _, tensor = piece.storage.partition(":")
        file = self._folder.parent / shard_file(int(rank))
        try:
            found = self[file].get_tensor(tensor)
        except SafetensorError as error:
            raise ValueError(f"{file} has no {tensor}: {error}.") from error
        self.bytes_read += piece.bytes
        return strided_view(found, piece)


KINDS: Mapping[str, Callable[[ModelSpec, ExitStack], Stored]] = {SHARDS: _Shards, TRAINING: _Training}
"""A file that tells a kind of checkpoint -> what opens it. Whatever is here, models start from and tools/convert.py reads."""
