"""Run a program as a torchrun job on this machine, with a time limit: a hang is a failure, not a wait."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.pool import Pool
from tests.torchrun import launch

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("any machine", deadline=None)  # a busy machine is no failing test
settings.load_profile("any machine")
Torchrun = Callable[..., "subprocess.CompletedProcess[str]"]
Ranks = Callable[[int], Pool]


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Variables that libraries set while a test uses them (vLLM's platform, wandb) are gone after it; else programs that later tests
    start would find them, and the fork server could not fork these."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


def pytest_collection_finish(session: pytest.Session) -> None:
    """The tests and what they have imported stay: no collection of garbage looks through them, which would take a second each."""
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Nor through what a test has imported (vLLM: half a million objects)."""
    if len(sys.modules) > _modules[0] + 200:
        _freeze()


_modules = [0]
"""How many had been imported when all objects were last hidden from the collector."""


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    _modules[0] = len(sys.modules)


@pytest.fixture
def torchrun(tmp_path: Path) -> Torchrun:
    """torchrun(ranks, source_or_arguments, seconds=...): a Python source text, or a list such as ["-m", "aligner.main"]."""

    def run(
        ranks: int, program: str | list[str], *, seconds: float = 150, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        if isinstance(program, str):
            script = tmp_path / "program.py"
            script.write_text(textwrap.dedent(program))
            program = [str(script)]
        paths = os.pathsep.join([str(ROOT), str(tmp_path)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})}
        try:
            return launch(ranks, program, cwd=tmp_path, env=environment, seconds=seconds)
        except subprocess.TimeoutExpired as late:
            pytest.fail(f"no end within {seconds} s\n{late.output[-3000:]}\n{late.stderr[-5000:]}")

    return run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """ranks(size): the module's world of so many ranks, on which `run(function, *arguments)` calls functions."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return pools[size]

    yield of
    for pool in pools.values():
        pool.close()
