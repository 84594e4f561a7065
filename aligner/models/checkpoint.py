"""Hugging Face safetensors: read by region into any layout, written from weights sharded over ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.models.hf_folder import SINGLE, prepare_partial, publish, write_rest, write_weights
from aligner.models.ownership import mark
from aligner.models.spec import ModelSpec
from aligner.models.stored import open_stored
from aligner.models.tensors import logical_tensors, new_tensors
from aligner.reshard.local import BUCKET_BYTES, LocalWeights, TensorWeights, WritableLocalWeights, copy_weights
from aligner.reshard.message.storage import allocate
from aligner.reshard.plan.block_scales import Shapes, scale_shapes
from aligner.reshard.plan.layout import WeightLayout, as_layout
from aligner.reshard.plan.region import Layout, Piece, whole_tensor
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.quantized_weights import QuantizedWeights
from aligner.reshard.transfer.executor import execute
from aligner.reshard.transfer.sync_stats import SyncStats
from aligner.reshard.weights import ShardedWeights, WritableWeights

FILE_BYTES = 5 << 30
"""Maximum bytes of a weight file."""


@torch.no_grad()
def read_into(spec: ModelSpec, layout: Layout, view: Callable[[Piece], Tensor]) -> int:
    """Fill `layout` from the model's folder, reading only the regions it holds; values are cast to the storages' dtype.

    A head that the folder does not have (see `new_tensors`) is set to zero.

    Args:
        layout: the pieces to fill.
        view: returns a writable view of a piece.

    Returns:
        Bytes of weights read from the files.

    Raises:
        ValueError: no safetensors, a missing or misshapen tensor, or a damaged file; the message names it.
    """
    new = new_tensors(spec)
    for piece in (piece for piece in layout if piece.name in new):
        view(piece).zero_()
    layout = [piece for piece in layout if piece.name not in new]
    return read_weights(spec, WritableLocalWeights(layout, view))


@torch.no_grad()
def read_weights(
    spec: ModelSpec, destination: WritableWeights, quantized: Shapes | None = None, setting: str = ""
) -> int:
    """Fill this rank's part of `destination` from the model's folder, which has every tensor.

    Args:
        quantized: name -> shape of the tensors that the destination keeps in FP8, and `setting`: what chose that; see
            `QuantizedWeights`.

    Returns and raises as `read_into`.
    """
    computed = scale_shapes(quantized or {})
    with open_stored(spec) as stored:
        names = dict.fromkeys(piece.name for piece in destination.pieces() if piece.name not in computed)
        source: ShardedWeights = LocalWeights(stored.layout(names), stored.view)
        if quantized:
            source = QuantizedWeights(source, quantized, setting)
        copy_weights(source, destination, verify=False)
        return stored.bytes_read


def export_checkpoint(
    rank: int,
    layouts: WeightLayout | Mapping[int, Layout],
    source: Callable[[Piece], Tensor],
    group: dist.ProcessGroup | None,
    out_dir: str | Path,
    spec: ModelSpec,
    dtype: str,
    *,
    device: torch.device | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    file_bytes: int = FILE_BYTES,
    run: str | None = None,
) -> SyncStats:
    """Write a role's weights as a Hugging Face folder; collective over the role's ranks, each of which writes a share.

    Each rank receives its share of the tensors (about 1 / ranks of the bytes, held in host memory) and writes it to
    files of its own. The folder gets its name only when it is complete, and replaces an earlier one.
    Configuration and tokenizer are copied from `spec.path`; a model with a scalar head becomes a
    `*ForSequenceClassification` of one label.

    Args:
        rank: this rank; `layouts` and `group` are in world ranks.
        layouts: the pieces that every rank of the role holds.
        source: returns a view of a piece that this rank holds.
        group: process group of exactly the role's ranks; None if there is one rank.
        out_dir: the folder to write, visible to every rank (on a shared file system if there are several hosts).
        dtype: data type of the written weights.
        device: device of the message buffers if the group is not gloo's; None: the CPU.
        bucket_bytes: maximum bytes of a message.
        file_bytes: maximum bytes of a weight file.
        run: the run that owns the folder, recorded in it; an existing folder must belong to the same run. None: no run.

    Returns:
        The transfer's statistics on this rank.

    Raises:
        ValueError: `out_dir` is the model's own folder, is not a checkpoint, or belongs to another run.
        PeerFailedError: another rank failed. If any rank fails, every rank raises; none waits forever.
    """
    device = device or torch.device("cpu")
    layout = as_layout(layouts)
    final, ranks = Path(out_dir).absolute(), layout.ranks
    partial = final.with_name(f".{final.name}.partial")
    shapes = logical_tensors(spec)
    files = files_of_writers(spec, ranks, dtype, file_bytes)
    written = {writer: [whole_tensor(name, shapes[name], dtype) for name in _names(files, writer)] for writer in ranks}
    steps = _CollectiveSteps(rank, ranks, group, device, f"writing {final}")
    try:
        with steps.step():
            if rank == ranks[0]:
                prepare_partial(final, partial, spec, run)
        with steps.step():
            plan = plan_transfer(rank, layout, written)
            tensors = allocate(written[rank], torch.device("cpu"))
        with steps.step():
            stats = execute(plan, source, TensorWeights(tensors, written[rank]), group, device, bucket_bytes)
            for file, (writer, names) in files.items():
                if writer == rank:
                    write_weights(partial / file, {name: tensors[name].view(shapes[name]) for name in names})
        with steps.step():
            if rank == ranks[0]:
                write_rest(partial, spec, dtype, {name: file for file, (_, names) in files.items() for name in names})
                mark(partial, run)
                publish(partial, final)
    except BaseException:
        if rank == ranks[0]:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return stats


def files_of_writers(
    spec: ModelSpec, ranks: Sequence[int], dtype: str, file_bytes: int
) -> dict[str, tuple[int, list[str]]]:
    """File name -> (rank that writes it, its tensors). Largest tensor first, to the writer with the fewest bytes so far."""
    pieces = {name: whole_tensor(name, shape, dtype) for name, shape in logical_tensors(spec).items()}
    load = dict.fromkeys(ranks, 0)
    owner: dict[str, int] = {}
    for name in sorted(pieces, key=lambda name: -pieces[name].bytes):
        owner[name] = min(load, key=lambda rank: load[rank])
        load[owner[name]] += pieces[name].bytes
    chunks: list[tuple[int, list[str]]] = []
    for rank in ranks:
        room = 0
        for name in (name for name in pieces if owner[name] == rank):
            if pieces[name].bytes > room:
                chunks.append((rank, []))
                room = file_bytes
            chunks[-1][1].append(name)
            room -= pieces[name].bytes
    if len(chunks) == 1:
        return {SINGLE: chunks[0]}
    return {
        f"model-{number:05d}-of-{len(chunks):05d}.safetensors": chunk for number, chunk in enumerate(chunks, start=1)
    }


def _names(files: Mapping[str, tuple[int, list[str]]], rank: int) -> list[str]:
    return [name for writer, names in files.values() if writer == rank for name in names]


class PeerFailedError(RuntimeError):
    """Another rank failed; this one did not."""


class _CollectiveSteps:
    """Steps that succeed on all ranks or raise on all of them."""

    def __init__(
        self, rank: int, ranks: Sequence[int], group: dist.ProcessGroup | None, device: torch.device, action: str
    ) -> None:
        self._rank, self._ranks, self._group, self._action = rank, ranks, group, action
        self._device = torch.device("cpu") if group is None or dist.get_backend(group) == "gloo" else device

    @contextmanager
    def step(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = torch.zeros(len(self._ranks), dtype=torch.int32, device=self._device)
        failed[self._ranks.index(self._rank)] = failure is not None
        if self._group is not None:
            dist.all_reduce(failed, group=self._group)
        if failure is not None:
            raise failure
        if failed.any():
            culprits = ", ".join(
                str(rank) for rank, has_failed in zip(self._ranks, failed.tolist(), strict=True) if has_failed
            )
            raise PeerFailedError(f"{self._action} failed on rank {culprits}; its own error says why")
