"""Experts in one kernel are Megatron's experts one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.trainer.config import PolicyConfig
from aligner.trainer.engines import backend
from tests.conftest import Ranks
from tests.models.tiny import save_tiny

FUNCTIONS = "tests.trainer.megatron.grouped_on_ranks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3-moe", tmp_path_factory.mktemp("moe"))  # 4 experts


@pytest.mark.parametrize("counts", [[8, 16, 8, 24], [5, 0, 17, 1], [0, 0, 0, 3], [0, 0, 0, 0]])
def test_equal_to_one_expert_after_the_other(counts: list[int], ranks: Ranks, folder: Path) -> None:
    """Whole multiples of the kernel's rows, any numbers, experts without rows, and none at all: within 1e-6."""
    for differences in ranks(1).run(f"{FUNCTIONS}:compare", folder, counts):
        assert max(differences) < 1e-6


@pytest.mark.parametrize(("saving", "heir"), [("sequential", "grouped"), ("grouped", "sequential")])
def test_a_checkpoint_is_continued_with_the_other(
    saving: str, heir: str, ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    """Weights to the last bit; an update more, by the moments, but for rounding."""
    assert max(ranks(2).run(f"{FUNCTIONS}:hand_over", folder, saving, heir, tmp_path)) < 1e-5


def test_torch_takes_the_arguments(ranks: Ranks, folder: Path) -> None:
    assert ranks(1).run(f"{FUNCTIONS}:fake_forward", folder) == [((32, 96), "torch.bfloat16", "cuda")]


def test_gpus_have_no_kernel_for_float32(folder: Path) -> None:
    spec, mesh, check = read_spec(folder), Mesh((0,), name="policy"), backend("megatron").check
    check(spec, mesh, PolicyConfig(experts="grouped"), False, True)
    check(spec, mesh, PolicyConfig(experts="grouped", dtype="bfloat16"), False, False)
    with pytest.raises(ValueError, match=r"policy\.dtype=float32; use policy\.experts=sequential, or dtype=bfloat16"):
        check(spec, mesh, PolicyConfig(experts="grouped"), False, False)
