"""What makes worker.py and the adapters run in any interpreter; `test_pool.py` runs them."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

from aligner.environments import adapters, worker

FILES = [Path(worker.__file__), *sorted(Path(adapters.__file__).parent.glob("*.py"))]


def imported(tree: ast.Module) -> set[str]:
    """Packages that a file imports wherever it is run: not those under `if TYPE_CHECKING:`."""
    nodes = [node for node in tree.body if not isinstance(node, ast.If)]
    imports = [inner for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)]
    names = [
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        for node in imports
    ]
    return {name.partition(".")[0] for several in names for name in several}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_file_is_python_3_8_and_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    assert imported(tree) <= sys.stdlib_module_names
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert future or path.stem == "__init__"  # so that annotations may be of later versions


def test_shortened_keeps_both_ends() -> None:
    assert worker.shortened("abcdefghij", 5) == "abc\n[... 5 characters left out ...]\nij"
    assert worker.shortened("abcdefghij", 1) == "a\n[... 9 characters left out ...]\n"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_an_exception_without_a_text_is_told() -> None:
    assert worker.failure_of(Mute()) == ("error", "Mute: (its text cannot be made)")


class Large:
    """A number of another package whose text needs more memory than there is."""

    shape = ()

    def item(self) -> float:
        raise MemoryError


def test_an_answer_that_needs_too_much_memory_is_a_failure() -> None:
    read, write = os.pipe()
    worker.Worker(-1, write, "")._send(7, {"id": 7, "turn": Large()})
    os.close(write)
    with open(read, "rb") as file:
        answer = json.loads(file.read()[worker.LENGTH.size :])
    assert (answer["id"], answer["failed"]) == (7, "memory")


def test_global_random_is_the_episodes_own() -> None:
    """Calls of two episodes in turn draw what each would draw alone."""
    import random

    def drawn(order: list[int]) -> dict[int, list[float]]:
        shared, states = worker.GlobalRandom(), {0: {}, 1: {}}
        values: dict[int, list[float]] = {0: [], 1: []}
        for episode in order:
            seed = episode if not states[episode] else None
            values[episode].append(shared.call(states[episode], seed, lambda: None, random.random))
        return values

    assert drawn([0, 0, 0, 1, 1, 1]) == drawn([1, 0, 1, 0, 0, 1])
