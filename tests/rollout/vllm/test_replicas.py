"""Replicas on part of a world, in real processes: TP2 beside a rank that only trains, and two TP1 replicas."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Ranks

Tokens = list[list[list[int]]]
REPLICAS = {"TP2": [[1, 2]], "two of TP1": [[1], [2]]}


def sampled(ranks: Ranks, folder: str, replicas: list[list[int]]) -> Tokens:
    """What ranks 1 and 2 sampled; rank 0 has no engine."""
    none, first, second = ranks(3).run("tests.rollout.vllm.replicas_on_ranks:sample", folder, replicas, seconds=200)
    assert none is None and first == second, "ranks of a replica disagree, or replicas with equal seeds"
    return first  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def untied(ranks: Ranks, models: dict[str, tuple[Any, str]]) -> dict[str, Tokens]:
    """What replicas of each layout sample, started one after the other in the same processes."""
    return {name: sampled(ranks, models["qwen2"][1], layout) for name, layout in REPLICAS.items()}


@pytest.mark.matrix
@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_on_part_of_the_world(untied: dict[str, Tokens], name: str) -> None:
    assert untied[name] == untied["TP2"], "samples depend on the layout of the replicas"


@pytest.mark.matrix
def test_a_tied_model(ranks: Ranks, models: dict[str, tuple[Any, str]]) -> None:
    assert sampled(ranks, models["qwen3_tied"][1], REPLICAS["TP2"])
