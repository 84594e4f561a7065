"""The account that a job opens: its budget, and only where residency decides by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligner.run.memory import open_account
from aligner.spmd import memory
from aligner.spmd.memory import GIB
from aligner.spmd.residency import Residency
from aligner.spmd.residency_config import ResidencyConfig

CPU = torch.device("cpu")


def budget(config: ResidencyConfig) -> float | None:
    journal = SimpleNamespace(enter=lambda what: None)
    world: Any = SimpleNamespace(rank=0, size=1, device=CPU, residency=Residency(CPU), journal=journal)
    open_account(world, config)
    return world.residency.account.budget if world.residency.account else None


def test_a_budget_that_was_given() -> None:
    assert budget(ResidencyConfig(budget_gib=1.5)) == 1.5 * GIB
    assert budget(ResidencyConfig(budget_gib=0.0)) == 0


def test_the_share_of_a_rank_of_what_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget(ResidencyConfig()) == pytest.approx(0.8 * memory.available(CPU, 4), rel=0.2)


@pytest.mark.parametrize("mode", ["off", "offload"])
def test_other_modes_need_none(mode: str) -> None:
    assert budget(ResidencyConfig(mode)) is None
