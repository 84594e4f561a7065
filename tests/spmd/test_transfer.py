"""Values between roles on real gloo ranks: any mix of shared and disjoint ranks gives the reader its rows."""

from __future__ import annotations

import pytest

from aligner.spmd.mesh import Mesh
from tests.conftest import Ranks

LAYOUTS = {
    "disjoint": (Mesh((0,)), Mesh((1,))),
    "data to tensor": (Mesh((0, 1)), Mesh((0, 1), tensor=2)),
    "tensor to data": (Mesh((0, 1), tensor=2), Mesh((0, 1))),
    "tensor to others' data": (Mesh((0, 1), tensor=2), Mesh((2, 3))),
    "data to overlapping pipeline": (Mesh((0, 1, 2)), Mesh((1, 2, 3), pipeline=3)),
    "all to one": (Mesh((0, 1, 2, 3)), Mesh((3,))),
    "one to all": (Mesh((2,)), Mesh((0, 1, 2, 3), tensor=2)),
}
"""The ranks where a value is, and those of the role that reads it."""
CASES = [
    pytest.param(size, *meshes, id=f"{size}-{name}")
    for size in (2, 4)
    for name, meshes in LAYOUTS.items()
    if max(meshes[0].ranks + meshes[1].ranks) < size
]
each_layout = pytest.mark.parametrize(("size", "source", "reader"), CASES)


@each_layout
def test_rows_arrive(ranks: Ranks, size: int, source: Mesh, reader: Mesh) -> None:
    ranks(size).run("tests.spmd.transfer_on_ranks:check_rows_arrive", source, reader)


@each_layout
def test_a_value_without_rows_arrives(ranks: Ranks, size: int, source: Mesh, reader: Mesh) -> None:
    ranks(size).run("tests.spmd.transfer_on_ranks:check_value_without_rows", source, reader)


@each_layout
def test_fewer_groups_than_shards(ranks: Ranks, size: int, source: Mesh, reader: Mesh) -> None:
    ranks(size).run("tests.spmd.transfer_on_ranks:check_fewer_groups_than_shards", source, reader)


@each_layout
def test_no_rank_branches_on_a_ref(ranks: Ranks, size: int, source: Mesh, reader: Mesh) -> None:
    ranks(size).run("tests.spmd.transfer_on_ranks:check_no_rank_branches_on_a_ref", source, reader)
