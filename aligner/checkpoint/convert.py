"""Offline conversion of a checkpoint: between Hugging Face files and the shards of any layout, and between data types."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aligner.checkpoint.lease import check_free
from aligner.models.checkpoint import FILE_BYTES, files_of_writers
from aligner.models.hf_folder import prepare_partial, publish, write_rest, write_weights
from aligner.models.ownership import mark
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.stored import Sharding, Stored, open_stored, shard_file, write_shards_index
from aligner.models.tensors import logical_tensors
from aligner.models.verify_checkpoint import check_weights
from aligner.reshard.local import LocalWeights, TensorWeights, copy_weights
from aligner.reshard.message.storage import allocate
from aligner.reshard.plan.region import Layout, whole_tensor
from aligner.reshard.transfer.sync_stats import SyncStats, total

CPU = torch.device("cpu")


def convert(
    source: str | Path,
    out: str | Path,
    sharding: Sharding | None,
    dtype: str | None = None,
    file_bytes: int = FILE_BYTES,
    trust_remote_code: bool = False,
) -> SyncStats:
    """Write the checkpoint in folder `source` to folder `out`, a file at a time: memory holds one file's weights.

    Each file is filled by the plan and the executor that also move weights between roles, and is proven likewise.

    Args:
        source: a Hugging Face checkpoint, or a folder of shards that this function wrote.
        out: the folder to write; it appears under its name when it is complete, and replaces a checkpoint there.
        sharding: one file for each rank of its layout; None: a Hugging Face checkpoint.
        dtype: of the written weights, "float32", "bfloat16" or "float16"; None: as config.json says.
        file_bytes: Hugging Face files are split beyond this size.
        trust_remote_code: Python files of the folder that its config.json names (auto_map) may be run.

    Returns:
        The transfer's account.

    Raises:
        ValueError: a folder that is not a checkpoint, one in the run_dir of a job that lives, one whose files are not what its
            config.json says, a layout that does not fit the model, or weights beyond what
            `dtype` holds; the message says which.
    """
    if file_bytes < 1:
        raise ValueError(f"--file-bytes {file_bytes} leaves no room for a tensor; use 1 or more, such as {FILE_BYTES}.")
    spec = read_spec(source, trust_remote_code)
    check_weights(spec)
    dtype = dtype or spec.dtype
    files = _files(spec, sharding, dtype, file_bytes)
    final = Path(out).absolute()
    partial = final.with_name(f".{final.name}.partial")
    for folder in final.parents[:3]:  # run_dir/model, run_dir/exports/step_50, run_dir/checkpoints/...
        check_free(folder)
    prepare_partial(final, partial, spec)
    try:
        with open_stored(spec) as stored:
            rows = [_write(stored, partial / name, layout, flat=sharding is not None) for name, layout in files]
        of_tensor = {} if sharding else {piece.name: name for name, layout in files for piece in layout}
        write_rest(partial, spec, dtype, of_tensor)
        if sharding:
            write_shards_index(partial, [layout for _, layout in files], dtype, sharding.sizes)
        mark(partial, None)
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return total(rows)


def _files(spec: ModelSpec, sharding: Sharding | None, dtype: str, file_bytes: int) -> Sequence[tuple[str, Layout]]:
    """The files to write, each with what it holds."""
    if sharding:
        layout = sharding.layout(spec, dtype)
        return [(shard_file(rank), layout.layout(rank)) for rank in layout.ranks]
    shapes = logical_tensors(spec)
    files = files_of_writers(spec, [0], dtype, file_bytes)
    return [(file, [whole_tensor(name, shapes[name], dtype) for name in names]) for file, (_, names) in files.items()]


def _write(stored: Stored, file: Path, layout: Layout, flat: bool) -> SyncStats:
    """Fill one file; storages of a shard are flat, tensors of a Hugging Face file have their shape."""
    tensors = allocate(layout, CPU)
    names = dict.fromkeys(piece.name for piece in layout)
    row = copy_weights(LocalWeights(stored.layout(names), stored.view), TensorWeights(tensors, layout))
    _check_range(tensors)
    shapes = {} if flat else {piece.storage: piece.size for piece in layout}
    write_weights(file, {name: tensor.view(shapes.get(name, -1)) for name, tensor in tensors.items()})
    return row


def _check_range(tensors: Mapping[str, Tensor]) -> None:
    """float16 ends at 65504: what is beyond would silently become infinite."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} has values that float16 cannot hold, or none to begin with; use --dtype bfloat16."
            )
