"""Every element of a checkpoint is held once by each replica, and ranks and tensors tell the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aligner.models.read_spec import read_spec
from aligner.models.tensors import logical_tensors
from aligner.spmd.mesh import Mesh
from aligner.trainer.config import PolicyConfig
from aligner.trainer.fsdp.checks import bytes_per_rank
from aligner.trainer.fsdp.layout import FsdpLayout, shard_rows
from tests.trainer.fsdp.families import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused experts, and a buffer that checkpoints hold."""
    folder = tmp_path_factory.mktemp("model")
    save_model("deepseek_v3", folder)
    return folder


def test_rows_of_shards_by_hand() -> None:
    assert [list(shard_rows(5, 4, shard)) for shard in range(4)] == [[0, 1], [2, 3], [4], []]
    for rows in range(1, 9):
        for shards in range(1, 6):
            cut = torch.arange(rows).chunk(shards)  # as FSDP2 cuts it
            held = [list(shard_rows(rows, shards, shard)) for shard in range(shards)]
            assert held == [part.tolist() for part in cut] + [[]] * (shards - len(cut))


@pytest.mark.parametrize(("ranks", "replicas"), [((0,), 1), ((1, 4, 5), 1), ((0, 1, 2, 3), 2), ((2, 3), 2)])
def test_every_element_is_held_once(folder: Path, ranks: tuple[int, ...], replicas: int) -> None:
    spec = read_spec(folder)
    layout = FsdpLayout(spec, Mesh(ranks, replicas=replicas))
    assert layout.ranks == ranks and layout.layout(7) == []
    for first in range(0, len(ranks), layout.shards):
        count = {name: torch.zeros(shape) for name, shape in logical_tensors(spec).items()}
        for rank in ranks[first : first + layout.shards]:
            for piece in layout.layout(rank):
                count[piece.name][tuple(slice(a, a + n) for a, n in zip(piece.lo, piece.size, strict=True))] += 1
        for name, times in count.items():
            whole = layout.shards if name.endswith("correction_bias") else 1  # a buffer, which is not cut
            assert (times == whole).all(), name
    for name in logical_tensors(spec):
        told = {(piece, rank) for piece, holders in layout.holders(name) for rank in holders}
        assert told == {(piece, rank) for rank in ranks for piece in layout.layout(rank) if piece.name == name}


def test_memory_by_hand(folder: Path) -> None:
    spec = read_spec(folder)
    weights = sum(torch.Size(shape).numel() for shape in logical_tensors(spec).values())
    half = PolicyConfig(engine="fsdp", dtype="bfloat16")
    assert bytes_per_rank(spec, Mesh((0, 1)), half, True) == weights / 2 * 16
    assert bytes_per_rank(spec, Mesh((0, 1, 2, 3), replicas=2), half, False) == weights / 2 * 2
