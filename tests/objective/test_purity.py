"""The mathematics stays mathematics: it imports torch and the standard library's plain parts, and nothing else."""

import ast
from pathlib import Path

import pytest

import aligner.objective

FILES = sorted(Path(aligner.objective.__path__[0]).glob("*.py"))
ALLOWED = {"torch", "math", "dataclasses", "typing", "collections", "functools", "enum", "aligner.objective"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path.name}: write imports in full"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_mathematics(path: Path) -> None:
    foreign = {
        name for name in imported(path) if not any(name == root or name.startswith(f"{root}.") for root in ALLOWED)
    }
    assert not foreign
    assert not any(name.startswith("torch.distributed") for name in imported(path))
