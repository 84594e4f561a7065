"""Every name of vLLM and Megatron-core that is called exists in the installed versions and takes the arguments that it is given.

On a GPU a wrong keyword would be the first thing to fail; most of these calls are not made on a CPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1] / "aligner"
LIBRARIES = ("vllm", "megatron")


def library_names(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(name in the file, module, name in the module) of what a file imports from the libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                yield alias.asname or alias.name, node.module or "", alias.name


def resolved(module: str, name: str) -> Any:
    """The object, or the submodule of that name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = importlib.import_module(module)
        return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")


def mistakes(path: Path, source: str | None = None) -> list[str]:
    """What does not fit the installed libraries."""
    tree, wrong = ast.parse(source or path.read_text()), []
    known: dict[str, Any] = {}
    for local, module, name in library_names(tree):
        try:
            known[local] = resolved(module, name)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{path.name}: {module}.{name}: {error}")
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        target, attributes = call.func, []
        while isinstance(target, ast.Attribute):
            attributes.insert(0, target.attr)
            target = target.value
        if not isinstance(target, ast.Name) or target.id not in known:
            continue
        function = known[target.id]
        for attribute in attributes:
            if function is None:  # set while a job runs
                break
            if not hasattr(function, attribute):
                wrong.append(f"{path.name}:{call.lineno}: {target.id} has no {attribute}")
                break
            function = getattr(function, attribute)
        else:
            wrong += [f"{path.name}:{call.lineno}: {text}" for text in misfits(function, call)]
    return wrong


def misfits(function: Any, call: ast.Call) -> Iterator[str]:
    """Arguments that the function does not take; starred ones are left to the run."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    kinds = {one.kind for one in parameters.values()}
    for keyword in call.keywords:
        if keyword.arg and keyword.arg not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            yield f"{ast.unparse(call.func)} takes no {keyword.arg}"
    places = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    given = [one for one in call.args if not isinstance(one, ast.Starred)]
    if len(given) > len(places) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        yield f"{ast.unparse(call.func)} takes {len(places)} arguments, not {len(given)}"
    if any(isinstance(one, ast.Starred) for one in call.args) or any(one.arg is None for one in call.keywords):
        return
    named = {one.arg for one in call.keywords} | {one.name for one in places[: len(given)]}
    for one in parameters.values():
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and one.name not in named:
            yield f"{ast.unparse(call.func)} wants {one.name}"


FILES = sorted(
    path for path in ROOT.rglob("*.py") if any(f"{word} {library}" in path.read_text() for library in LIBRARIES for word in ("from", "import"))
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_calls_fit_the_installed_versions(path: Path) -> None:
    assert mistakes(path) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            "from megatron.core.optimizer import OptimizerConfig\nOptimizerConfig(lr=1.0, adam_beta3=0.9)",
            "takes no adam_beta3",
        ),
        ("from megatron.core.jit import disable_jit\ndisable_jit()", "disable_jit"),
        ("from megatron.core import parallel_state\nparallel_state.set_everything()", "has no set_everything"),
        ("from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p as cut\ncut(1, 2)", "wants p"),
    ],
)
def test_a_wrong_call_is_found(source: str, found: str) -> None:
    assert any(found in text for text in mistakes(Path("file.py"), source))


def test_what_is_reached_through_objects() -> None:
    """Methods of vLLM's objects, which imports do not show: on the way of a sleeping engine and of single steps."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    for owner, method, names in (
        (Executor, "discard", ["tags"]),
        (Executor, "wake_up", ["tags"]),
        (LLMEngine, "add_request", ["request_id", "prompt", "params"]),
        (LLMEngine, "abort_request", ["request_ids", "internal"]),
        (LLMEngine, "reset_prefix_cache", ["reset_running_requests"]),
        (LLMEngine, "step", []),
        (Scheduler, "shutdown", []),
    ):
        parameters = inspect.signature(getattr(owner, method)).parameters
        assert set(names) <= parameters.keys(), f"{owner.__name__}.{method}"
    backends: Any = importlib.import_module("vllm.device_allocator.sleep_mode_backend")
    assert "level" in inspect.signature(backends.CuMemBackend.suspend).parameters
    assert "sleeping_tags" in inspect.getsource(Executor.__init__)
    assert importlib.import_module("vllm.device_allocator").DEFERRABLE_TAGS == ("weights", "kv_cache")
    worker = (Path(importlib.import_module("vllm").__file__ or "").parent / "v1/worker/gpu_worker.py").read_text()
    assert '_maybe_get_memory_pool_context("workspace")' in worker and "def sleep_mode_backend(self)" in worker
