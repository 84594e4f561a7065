"""One rank of the export tests: reads its TP2 x PP2 part of each model and writes it back with its peers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from aligner.models.checkpoint import export_checkpoint, read_into
from aligner.models.read_spec import read_spec
from aligner.reshard.local import TensorWeights
from aligner.reshard.message.storage import allocate
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.layout import MegatronLayout
from tests.reshard.ranks import report, start_rank

TENSOR, PIPELINE = 2, 2


def main() -> None:
    folder, models, out = (Path(argument) for argument in sys.argv[1:4])
    rank, world = start_rank(folder)
    rows = {}
    for path in sorted(models.iterdir()):
        spec = read_spec(path)
        side = MegatronLayout(spec, Mesh(tuple(range(world)), TENSOR, PIPELINE), "float32")
        layouts = {other: side.layout(other) for other in side.ranks}
        held = TensorWeights(allocate(layouts[rank], torch.device("cpu")), layouts[rank])
        read_into(spec, layouts[rank], held.view)
        for dtype, file_bytes in (("float32", 60_000), ("bfloat16", 1 << 30)):
            target = out / f"{path.name}-{dtype}"
            for _ in range(2):  # the second replaces the first
                row = export_checkpoint(
                    rank,
                    layouts,
                    held.view,
                    dist.group.WORLD,
                    target,
                    spec,
                    dtype,
                    bucket_bytes=9000,
                    file_bytes=file_bytes,
                )
            rows[target.name] = row.metrics()
    report(folder, {"rows": rows, "errors": errors(rank, world, models, out)})


def errors(rank: int, world: int, models: Path, out: Path) -> dict[str, str]:
    """Failures on one rank are errors on all."""
    spec = read_spec(models / "qwen2-tied")
    side = MegatronLayout(spec, Mesh(tuple(range(world)), tensor=2), "float32")
    layouts = {other: side.layout(other) for other in side.ranks}
    held = TensorWeights(allocate(layouts[rank], torch.device("cpu")), layouts[rank])
    (out / "occupied").mkdir(exist_ok=True)
    (out / "occupied" / "notes.txt").write_text("keep me")
    found = {}
    broken = TensorWeights({}, layouts[rank])
    for name, target, source in (
        ("own folder", models / "qwen2-tied", held.view),
        ("occupied", out / "occupied", held.view),
        ("unreadable", out / "never", broken.view if rank == 1 else held.view),
    ):
        try:
            export_checkpoint(rank, layouts, source, dist.group.WORLD, target, spec, "float32")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    main()
