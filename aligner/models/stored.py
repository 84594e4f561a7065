"""Reading checkpoints by region: Hugging Face files, or one file for each rank of any parallel layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from aligner.models.hf_folder import files_of_tensors, names_in_files, opened, write_rest
from aligner.models.spec import ModelSpec
from aligner.models.tensors import logical_tensors
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.layout import WeightLayout
from aligner.reshard.plan.region import Box, Layout, Piece, whole_tensor

SHARDS = "shards.json"
"""The file that marks a folder of shards."""
TRAINING = "training.json"
"""The file that marks a role's folder in a training checkpoint."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Stored(Protocol):
    """An open checkpoint."""

    bytes_read: int
    """Bytes of weights read so far."""

    def layout(self, names: Iterable[str]) -> list[Piece]:
        """The pieces of these tensors. Raises ValueError if one is missing, misshapen or of an unknown data type."""

    def view(self, piece: Piece) -> Tensor:
        """The elements of a piece, or of a crop of one, in the stored data type."""


@contextmanager
def open_stored(spec: ModelSpec) -> Iterator[Stored]:
    """The checkpoint in the model's folder: of the first kind in `KINDS` whose file exists, else Hugging Face files."""
    open_kind = next((kind for file, kind in KINDS.items() if (Path(spec.path) / file).is_file()), _HuggingFace)
    with ExitStack() as stack:
        yield open_kind(spec, stack)


class _Files:
    """Safetensors files, opened on first use."""

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
        self._stored = names_in_files(spec, self._files)

    def layout(self, names: Iterable[str]) -> list[Piece]:
        return [self._piece(name) for name in names]

    def view(self, piece: Piece) -> Tensor:
        file = self._files[piece.storage]
        try:
            if not piece.size:  # a slice of no dimensions is not a slice to safetensors
                value = self[file].get_tensor(piece.storage)
            else:
                box = tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))
                value = self[file].get_slice(piece.storage)[box]
        except SafetensorError as error:
            raise ValueError(f"{file}: {piece.name}{piece.box} cannot be read: {error}") from error
        self.bytes_read += piece.bytes
        return value

    def _piece(self, name: str) -> Piece:
        if name not in self._stored:
            raise ValueError(
                f"{self._folder} has no tensor {name}; its weights do not fit its config.json "
                "(architectures, num_hidden_layers and tie_word_embeddings decide which tensors there are)."
            )
        stored_name = self._stored[name]
        file = self._files[stored_name]
        try:
            stored = self[file].get_slice(stored_name)
        except SafetensorError as error:
            raise ValueError(f"{file} has no tensor {stored_name}, which its index says it has: {error}") from error
        shape = tuple(stored.get_shape())
        if shape != self._shapes[name]:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json says {self._shapes[name]}.")
        if stored.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{file}: {name} is {stored.get_dtype()}; weights must be {', '.join(_DTYPES.values())}: convert them "
                "with transformers: AutoModelForCausalLM.from_pretrained(..., dtype=...).save_pretrained(...)."
            )
        return replace(whole_tensor(name, shape, _DTYPES[stored.get_dtype()]), storage=stored_name)


class Sharding(Protocol):
    """How weights are split into one file for each rank."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Parallel sizes by name, written to the folder for information."""

    def layout(self, spec: ModelSpec, dtype: str) -> WeightLayout:
        """The pieces in each rank's file. Raises ValueError if the model cannot be split so."""


Entry = tuple[str, Sequence[int], Sequence[int], str, int, Sequence[int]]
"""A piece as JSON: logical tensor, first element, extent, storage, offset in it, strides."""


def entry_of(piece: Piece) -> Entry:
    """A piece as JSON, without its data type."""
    return piece.name, piece.lo, piece.size, piece.storage, piece.offset, piece.stride


def piece_of(entry: Entry, file: int, dtype: str) -> Piece:
    """The piece, in the file of rank `file`."""
    name, lo, size, storage, offset, stride = entry
    return Piece(name, tuple(lo), tuple(size), f"{file}:{storage}", offset, tuple(stride), dtype)


def shard_file(rank: int) -> str:
    """Name of a rank's file, which holds its flat storages by the layout's names."""
    return f"rank-{rank:05d}.safetensors"


def write_shards_index(folder: Path, layouts: Sequence[Layout], dtype: str, sizes: Mapping[str, int]) -> None:
    """Write shards.json, which lists the pieces in each rank's file, so that a reader needs no layout arithmetic."""
    index = {"dtype": dtype, **sizes, "files": [[entry_of(piece) for piece in layout] for layout in layouts]}
    (folder / SHARDS).write_text(json.dumps(index) + "\n", encoding="utf-8")


class _RankFiles(_Files):
    """One file for each rank that wrote, with its pieces."""

    def __init__(self, stack: ExitStack, folder: Path, pieces: Iterable[Piece], remedy: str = "") -> None:
        """
        Args:
            pieces: those of all files; if several hold a region, the first is read.
            remedy: appended to errors about a damaged file.
        """
        super().__init__(stack)
        self._folder, self._remedy = folder, remedy
        self._pieces: dict[str, dict[Box, Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.name, {}).setdefault(piece.box, piece)

    def layout(self, names: Iterable[str]) -> list[Piece]:
        names = list(names)
        missing = [name for name in names if name not in self._pieces]
        if missing:
            raise ValueError(f"{self._folder} has no part of {missing[0]}{self._remedy}.")
        return [piece for name in names for piece in self._pieces[name].values()]

    def view(self, piece: Piece) -> Tensor:
        rank, _, storage = piece.storage.partition(":")
        file = self._folder / shard_file(int(rank))
        try:
            tensor = self[file].get_tensor(storage)  # memory-mapped, not read
        except SafetensorError as error:
            raise ValueError(f"{file} has no {storage}: {error}{self._remedy}.") from error
        self.bytes_read += piece.bytes
        return strided_view(tensor, piece)


def _open_shards(spec: ModelSpec, stack: ExitStack) -> _RankFiles:
    """A folder that tools/convert.py wrote."""
    folder = Path(spec.path)
    try:
        index = json.loads((folder / SHARDS).read_text(encoding="utf-8"))
        files, dtype = index.get("files"), index["dtype"]
        if not isinstance(files, list):
            raise ValueError("it does not list what each file holds, as earlier versions did not")
        if dtype not in _DTYPES.values():
            raise ValueError(f"its dtype {dtype!r} is not one that tools/convert.py writes")
        pieces = [piece_of(entry, rank, dtype) for rank, entries in enumerate(files) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / SHARDS} is not valid: {error}; convert the checkpoint again.") from error
    missing = [rank for rank in range(len(files)) if not (folder / shard_file(rank)).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {shard_file(missing[0])}; convert the checkpoint again.")
    return _RankFiles(stack, folder, pieces, "; convert the checkpoint again")


def describe_training(spec: ModelSpec, role: str) -> dict[str, bytes]:
    """Files, by name, that make a role's folder in a training checkpoint usable as model.path and by tools/convert.py."""
    with TemporaryDirectory() as folder:
        write_rest(Path(folder), spec, "float32", {})
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return {**files, TRAINING: json.dumps({"role": role}).encode()}


def _open_training(spec: ModelSpec, stack: ExitStack) -> _RankFiles:
    """A role of a training checkpoint, such as step-00000050/policy; its fp32 weights are in the rank files one folder above."""
    folder = Path(spec.path).resolve()
    try:
        key = f"{json.loads((folder / TRAINING).read_text())['role']}/param"
        indices = [json.loads(file.read_text()) for file in sorted(folder.parent.glob("rank-*.json"))]
        pieces = [
            piece_of(entry, rank, "float32")
            for rank, index in enumerate(indices)
            for entry in index["tensors"].get(key, ())
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be read as a part of a training checkpoint: {error!r}.") from None
    return _RankFiles(stack, folder.parent, pieces)


KINDS: Mapping[str, Callable[[ModelSpec, ExitStack], Stored]] = {SHARDS: _open_shards, TRAINING: _open_training}
"""Marking file of each kind of checkpoint -> the function that opens it, for model.path and tools/convert.py."""
