"""Who may import whom: `lint-imports` passes, and each of its contracts in pyproject.toml fails when it is broken."""

from __future__ import annotations

from copy import deepcopy
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any

import grimp
import pytest
from importlinter.api import read_configuration
from importlinter.cli import lint_imports
from importlinter.contracts.acyclic_siblings import AcyclicSiblingsContract
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract
from importlinter.contracts.protected import ProtectedContract

from tools.import_contracts import OnlyContract

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
CONFIGURATION = read_configuration(str(PYPROJECT))
CONTRACTS = {options["id"]: options for options in CONFIGURATION["contracts_options"]}
TYPES = {
    "layers": LayersContract,
    "forbidden": ForbiddenContract,
    "protected": ProtectedContract,
    "only": OnlyContract,
    "acyclic_siblings": AcyclicSiblingsContract,
}
BROKEN_BY = {
    "reshard-is-neutral": [
        ("aligner.reshard.sync", "aligner.rollout.vllm.layout"),
        ("aligner.reshard.plan.layout", "aligner.models.family"),
        ("aligner.reshard.transfer.executor", "aligner.trainer.policy"),
        ("aligner.reshard.weights", "aligner.roles.build"),
    ],
    "megatron": [("aligner.trainer.policy", "megatron"), ("aligner.rollout.role", "megatron")],
    "training-backends": [
        ("aligner.trainer.minibatch_loss", "aligner.trainer.megatron.engine"),
        ("aligner.models.stored", "aligner.trainer.megatron.layout"),
    ],
    "vllm": [("aligner.trainer.policy", "vllm"), ("aligner.rollout.generation", "vllm")],
    "rollout-engines": [
        ("aligner.rollout.generation", "aligner.rollout.vllm.engine"),
        ("aligner.check.job", "aligner.rollout.transformers.sizes"),
    ],
    "objective-is-pure": [
        ("aligner.objective.losses", "numpy"),
        ("aligner.objective.kl", "aligner.data.samples"),
        ("aligner.objective", "scipy"),
    ],
    "settings-are-light": [
        ("aligner.config.schema", "torch"),
        ("aligner.rollout.config", "vllm"),
        ("aligner.trainer.config", "aligner.trainer.policy"),
    ],
    "no-circles": [
        ("aligner.check.job", "aligner.run.prepare"),
        ("aligner.config.as_json", "aligner.run.job"),
        ("aligner.report.metric_registry", "aligner.trainer.update_metrics"),
        ("aligner.spmd.transfer", "aligner.spmd.ref"),
        ("aligner.run.job", "aligner.run.loop"),
        ("aligner.bounds", "aligner.config.schema"),
    ],
}
"""Contract -> imports (importer, imported), each of which breaks it; layers break by what a layer imports from above."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "aligner", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def check(contract: str, graph: grimp.ImportGraph) -> bool:
    """Whether the contract is kept."""
    options, graph = CONTRACTS[contract], deepcopy(graph)  # a check removes the imports that the contract ignores
    checked = TYPES[options["type"]](options["name"], CONFIGURATION["session_options"], options).check(graph, False)
    return checked.kept


def upward(options: dict[str, Any]) -> list[tuple[str, str]]:
    """For each layer an import from the one above it, and of what stands in one line one from its neighbour."""
    container, layers = options["containers"][0], [layer.split(" | ") for layer in options["layers"]]
    imports = [(below[-1], above[0]) for above, below in pairwise(layers)]
    imports += [pair for layer in layers for pair in pairwise(layer)]
    return [(f"{container}.{importer}", f"{container}.{imported}") for importer, imported in imports]


CASES = [
    pytest.param(contract, importer, imported, id=f"{contract}: {importer.removeprefix('aligner.')} imports {imported}")
    for contract, options in CONTRACTS.items()
    for importer, imported in (upward(options) if options["type"] == "layers" else BROKEN_BY[contract])
]


def test_every_contract_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(PYPROJECT.parent)
    assert lint_imports(config_filename=str(PYPROJECT), no_cache=True, no_logo=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("contract", "importer", "imported"), CASES)
def test_a_contract_fails_when_it_is_broken(
    contract: str, importer: str, imported: str, graph: grimp.ImportGraph
) -> None:
    broken = deepcopy(graph)
    if imported not in broken.modules:
        broken.add_module(imported, is_squashed=True)
    assert importer in broken.modules, f"{importer} has been moved: name another module"
    assert check(contract, broken)
    broken.add_import(importer=importer, imported=imported, line_number=1, line_contents=f"import {imported}")
    assert not check(contract, broken)


def test_no_circle_of_modules_even_for_types() -> None:
    """Imports under TYPE_CHECKING count here, as they do for a reader."""
    graph = grimp.build_graph("aligner", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # CycleError names the circle
    with pytest.raises(CycleError, match="nodes are in a cycle"):
        TopologicalSorter({**imports, "aligner.bounds": {"aligner.config.schema"}}).prepare()


def test_abstract_methods_are_declared_abstract() -> None:
    """A class that lacks one cannot be made: nothing waits for a call to raise NotImplementedError."""
    package = PYPROJECT.parent / "aligner"
    assert [path for path in package.rglob("*.py") if "NotImplementedError" in path.read_text()] == []
