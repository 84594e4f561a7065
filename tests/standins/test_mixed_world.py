"""Training and a weight sync in a world whose ranks have a device beside the host, as on GPUs: nothing mixes the two, the numbers
are the host's, and each collective runs where its tensors are.

What NCCL would do itself is not shown: both kinds of device talk over gloo here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import torchrun
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.standins
CASES: dict[str, dict[str, Any]] = {
    "tensor": {"layout": {"tensor": 2}},
    "pipeline": {"layout": {"pipeline": 2}},
    "context": {"layout": {"context": 2}},
    "experts": {"model": "qwen3-moe", "layout": {"expert": 2}, "experts": "grouped"},
    "data, overlapped": {"layout": {}, "overlap_grad_reduce": True},
}
RANKS = 4
Done = dict[str, list[dict[str, Any]]]
"""Case -> what each rank did."""


def launch(ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return torchrun.launch(ranks, ["-m", "tests.standins.mixed_world", *arguments], cwd=folder, env=env, seconds=500)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models = {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in ("llama", "qwen3-moe")}
    return [{**case, "model": str(models[case.get("model", "llama")])} for case in CASES.values()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cases: list[dict[str, Any]]) -> Callable[[str], Done]:
    """What was done on "device" or "host"; each world starts once, for all cases."""
    folder = tmp_path_factory.mktemp("mixed")
    known: dict[str, Done] = {}

    def on(kind: str) -> Done:
        if kind not in known:
            ended = launch(RANKS, folder / kind, json.dumps(cases), kind)
            assert ended.returncode == 0, ended.stderr[-5000:]
            by_rank = [json.loads((folder / kind / f"{rank}.json").read_text()) for rank in range(RANKS)]
            known[kind] = {case: [rank[number] for rank in by_rank] for number, case in enumerate(CASES)}
        return known[kind]

    return on


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_host(case: str, done: Callable[[str], Done]) -> None:
    for device, host in zip(done("device")[case], done("host")[case], strict=True):
        assert device["device"] == "standin" and host["device"] == "cpu"
        assert device["numbers"] == pytest.approx(host["numbers"], rel=2e-6, abs=2e-5)


NEIGHBOURS, FAR, ALL = {(0, 1), (2, 3)}, {(0, 2), (1, 3)}, {(0, 1, 2, 3)}
GROUPS: dict[str, set[tuple[int, ...]]] = {
    "tensor": NEIGHBOURS | FAR | ALL,
    "pipeline": NEIGHBOURS | FAR | ALL,
    "context": ALL,
    "experts": NEIGHBOURS | FAR | ALL,
    "data, overlapped": ALL,
}
"""Ranks whose process groups have collectives on the device. All: the norm of the gradients, the weight sync."""


@pytest.mark.parametrize("case", CASES)
def test_where_collectives_run(case: str, done: Callable[[str], Done]) -> None:
    """Weights, gradients and hidden states on the device; counts, metrics and what is pickled on the host."""
    of_ranks = done("device")[case]
    used = {(name, tuple(ranks), kind) for rank in of_ranks for name, ranks, kind in rank["collectives"]}
    assert {ranks for _, ranks, kind in used if kind == "device" and len(ranks) > 1} == GROUPS[case]


@pytest.mark.parametrize("case", ["tensor", "context", "data, overlapped"])
def test_what_an_update_waits_for(case: str, done: Callable[[str], Done]) -> None:
    """The norm of the gradients, the loss, the entropy; a stage of a pipeline also for the lengths of what it is sent, experts for
    their numbers of tokens."""
    assert {rank["waits"] for rank in done("device")[case]} == {3}


def test_a_tensor_on_the_wrong_side_is_found(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    ended = launch(1, tmp_path / "wrong", json.dumps(cases[-1:]), "device", "tokens on the host")
    assert ended.returncode != 0 and "tensors of the host and of the device" in ended.stderr
