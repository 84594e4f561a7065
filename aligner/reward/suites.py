"""Tests of programs in the forms in which data sets hold them, read into one: a suite. What is not understood is refused.

    ["assert f(2) == 4", ...] or one text             HumanEval, MBPP, KodCode, AceCode: Python; see `python_tests.py`
    [{"input": "2\\n", "output": "4\\n"}, ...]        standard input and output; lists of lines too
    {"inputs": [...], "outputs": [...]}               the same by columns: APPS, TACO, PRIME, Eurus
      ... with "fn_name", "func_name", an entry_point, or testtype=functional and metadata.func_name
                                                      calls: APPS, TACO, LiveCodeBench, DeepCoder, LeetCode
    {"test": text, "entry_point": name}, {"test_list": [...], "test_setup_code": text, "test_imports": [...]}
    {"functional": text}, {"pytest": text}, {"tests" | "test_cases" | "input_output" | "ground_truth": any of these}

Any of these may be JSON text (or Python's repr) of itself.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligner.reward.python_tests import MODULES, Scripts
from aligner.reward.sandboxed.wire import Pack, WeightLayout

FORMS = (
    'tests must be Python text, a list of texts, a list of {"input": text, "output": text}, '
    '{"inputs": [...], "outputs": [...]}, {"test": text, "entry_point": name}, {"test_list": [...]}, or JSON text of one of these'
)
WRAPS = (
    "tests",
    "test_cases",
    "input_output",
    "ground_truth",
    "unit_tests",
    "test_list",
    "test",
    "functional",
    "pytest",
)
NAMES = ("entry_point", "fn_name", "func_name")
SHOWN = 80


@dataclass
class Suite:
    """What a program has to pass."""

    entry: str | None = None
    """The function in question, or Solution().method."""
    setup: list[str] = field(default_factory=list)
    """Python that runs before the program and before the tests."""
    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    """{"entry", "args", "kwargs", "wanted", "unwrap"}; values packed."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """(standard input, standard output)."""
    scripts: Scripts = field(default_factory=Scripts)

    def plan(self, partial: bool) -> dict[str, Any]:
        """What `sandboxed/harness.py` needs to know."""
        scripts = self.scripts
        return {
            "name": scripts.name,
            "entry": (self.entry or "").split(".")[-1],
            "partial": partial,
            "setup": self.setup,
            "scripts": scripts.sources,
            "tests": [*scripts.tests, *({"kind": "call", **call} for call in self.calls)],
            "shared": scripts.shared,
            "dropped": scripts.dropped,
            "wanted": scripts.wanted,
            "modules": list(MODULES),
            "standard": scripts.modules,
            "imports": scripts.imports,
        }


def read_suite(
    tests: Any, entry_point: Any = None, setup: Sequence[Any] = (), metadata: Any = None, prefix: str = ""
) -> Suite:
    """The suite in a row's `tests`.

    Args:
        entry_point: of the row, where the tests do not name it.
        setup: imports and definitions of the row, as texts or lists of lines.
        metadata: LiveCodeBench's, an object or JSON text of it, which may name the function.
        prefix: Python of the prompt; where it defines the entry point, as HumanEval's, it is setup too.

    Raises:
        ValueError: it is not understood, or nothing in it could fail a wrong program.
    """
    suite = Suite(entry=_name(entry_point, metadata), setup=[text for part in setup if (text := _lines(part, "setup"))])
    _read(tests, suite)
    if suite.entry and _defines(prefix, suite.entry.split(".")[-1]):
        suite.setup.append(prefix)
    if suite.pairs and not any(output.strip() for _, output in suite.pairs):
        raise ValueError("every test's output is empty, so a program that does nothing would pass")
    suite.scripts = Scripts.read(suite.texts, suite.entry, suite.setup)
    if not (suite.calls or suite.pairs or suite.scripts.tests):
        raise ValueError(f"there is no test in tests={_shown(tests)}; {FORMS}")
    return suite


def _read(tests: Any, suite: Suite, depth: int = 0) -> None:
    """Into the suite."""
    if depth > 8:
        raise ValueError(f"tests are nested too deeply; {FORMS}")
    if isinstance(tests, str):
        found = _from_text(tests)
        if found is None:
            suite.texts.append(tests)
        else:
            _read(found, suite, depth + 1)
    elif isinstance(tests, Mapping):
        _read_mapping(tests, suite, depth)
    elif isinstance(tests, Sequence) and not isinstance(tests, bytes) and len(tests):
        for test in tests:
            if not isinstance(test, str | Mapping):
                raise ValueError(f"a test must be text or an object, not {_shown(test)}; {FORMS}")
            if isinstance(test, str):
                suite.texts.append(test)
            else:
                _read_mapping(test, suite, depth + 1)
    else:
        raise ValueError(f"tests={_shown(tests)} has no test; {FORMS}")


def _from_text(text: str) -> Any:
    """What JSON or Python's repr says; None for what is Python code."""
    stripped = text.strip()
    if not stripped:
        raise ValueError(f"tests={text!r} is empty; {FORMS}")
    if re.fullmatch(r"eJ[\w+/=\s]{40,}", stripped):
        raise ValueError("tests are compressed (LiveCodeBench's private tests); decode them when the data is prepared")
    try:
        found = json.loads(stripped, strict=False)
    except (ValueError, RecursionError):
        if stripped[0] not in "[{":
            return None
        try:
            found = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    if not isinstance(found, str | list | dict):
        raise ValueError(f"tests={_shown(text)} is no test; {FORMS}")
    return found


def _read_mapping(test: Mapping[str, Any], suite: Suite, depth: int) -> None:
    entry = _name(next((test[name] for name in NAMES if test.get(name)), None), test.get("metadata")) or suite.entry
    suite.entry = suite.entry or entry
    for name in ("test_imports", "test_setup_code"):
        if test.get(name):
            suite.setup.append(_lines(test[name], name))
    if "inputs" in test or "outputs" in test:
        inputs, outputs = (_column(test, name) for name in ("inputs", "outputs"))
        if len(inputs) != len(outputs):
            raise ValueError(f"tests have {len(inputs)} inputs and {len(outputs)} outputs")
        for given, wanted in zip(inputs, outputs, strict=True):
            _read_pair(given, wanted, test, entry, suite)
    elif "output" in test:
        _read_pair(test.get("input"), test["output"], test, entry, suite)
    else:
        held = [name for name in WRAPS if test.get(name) is not None]
        if not held and test.get("public_test_cases") is not None:
            held = [name for name in ("public_test_cases", "private_test_cases") if test.get(name)]
        if not held:
            raise ValueError(f"a test {_shown(dict(test))} is of no known form; {FORMS}")
        for name in held:
            _read(test[name], suite, depth + 1)


def _column(test: Mapping[str, Any], name: str) -> Sequence[Any]:
    column = test.get(name)
    if isinstance(column, str):
        column = _from_text(column) if column.strip() else None
    if not isinstance(column, Sequence) or isinstance(column, str | bytes) or not len(column):
        raise ValueError(f"tests' {name} must be a list of at least one, not {_shown(column)}")
    return column


def _read_pair(given: Any, wanted: Any, test: Mapping[str, Any], entry: str | None, suite: Suite) -> None:
    kind = str(test.get("testtype") or test.get("type") or "").lower()
    called = isinstance(given, str) and given.strip().startswith("Solution().")
    if kind in ("functional", "function_call", "call_based") or (
        kind not in ("stdin", "stdin_stdout") and (entry or called)
    ):
        if not entry and called:
            assert isinstance(given, str)
            entry = given.strip().split("(", 2)[0] + "()." + given.strip()[len("Solution().") :].split("(")[0]
        if not entry:
            raise ValueError(
                "tests are calls of a function that they do not name; give the row an entry_point or fn_name"
            )
        suite.calls.append(_call(given, wanted, entry))
    else:
        suite.pairs.append((_lines(given, "input") if given is not None else "", _lines(wanted, "output")))


def _lines(text: Any, name: str) -> str:
    """Text, or a list of its lines."""
    if isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(line, str) for line in text):
        return "\n".join(line.removesuffix("\n") for line in text)
    if not isinstance(text, str):
        raise ValueError(f"a test's {name} must be text or a list of lines, not {_shown(text)}")
    return text


def _call(given: Any, wanted: Any, entry: str) -> dict[str, Any]:
    args: Any
    kwargs: Any = {}
    if isinstance(given, str):
        args, kwargs = _arguments(given)
    elif isinstance(given, Mapping):
        args, kwargs = [], dict(given)
    elif isinstance(given, Sequence):
        args = list(given)
    elif isinstance(given, int | float):
        args = [given]
    else:
        raise ValueError(f"a test's input must be arguments, not {_shown(given)}")
    # APPS holds a result in a list of one; text is the result itself, as in LiveCodeBench
    unwrap = isinstance(wanted, list) and len(wanted) == 1
    wanted = _literal(wanted) if isinstance(wanted, str) else wanted
    if len(args) == 1 and isinstance(args[0], dict):
        args = [_numbered(args[0])]
    return {
        "entry": entry,
        "args": _packed(args),
        "kwargs": _packed(kwargs),
        "wanted": _packed(wanted),
        "unwrap": unwrap,
    }


def _packed(plain: Any) -> list[Any]:
    """Python's literals as JSON: tuples, sets, bytes and infinities too."""
    pack = Pack(WeightLayout())
    return [pack.value(plain), pack.nodes]


def _numbered(keyed: dict[Any, Any]) -> dict[Any, Any]:
    """JSON has made text of a dictionary's numbers; the evaluators of APPS undo it for a single argument."""
    try:
        return {int(key): value for key, value in keyed.items()}
    except (ValueError, TypeError):
        return keyed


def _arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """One JSON value a line (LiveCodeBench), `nums = [1, 2], k = 3`, or the whole call (LeetCode)."""
    if not text.strip():
        return [], {}
    for parts in (text.strip("\n").split("\n"), [text]):
        try:
            return [json.loads(part) for part in parts], {}
        except ValueError:
            pass
    inner = text.strip() if re.match(r"[\w().]+\(.*\)$", text.strip(), re.DOTALL) else f"f({text})"
    try:
        call = ast.parse(inner, mode="eval").body
        assert isinstance(call, ast.Call) and all(keyword.arg for keyword in call.keywords)
        args = [_evaluated(node) for node in call.args]
        return args, {str(keyword.arg): _evaluated(keyword.value) for keyword in call.keywords}
    except (AssertionError, ValueError, SyntaxError, TypeError):
        pass
    try:
        return [ast.literal_eval(part) for part in text.strip("\n").split("\n")], {}
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"a test's input {_shown(text)} is neither JSON, one argument a line, nor a call") from None


def _evaluated(node: ast.expr) -> Any:
    """A literal; true, false and null are JSON's."""
    names = {"true": True, "false": False, "null": None}

    class Spelled(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return ast.copy_location(ast.Constant(names[name.id]), name) if name.id in names else name

    return ast.literal_eval(Spelled().visit(node))


def _literal(text: str) -> Any:
    """What JSON or Python says a result is; text that is neither is itself."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _name(entry: Any, metadata: Any) -> str | None:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    if not entry and isinstance(metadata, Mapping):
        entry = next((metadata[name] for name in NAMES if metadata.get(name)), None)
    if not entry:
        return None
    if not isinstance(entry, str) or not re.fullmatch(r"(?:[^\W\d]\w*(?:\(\))?\.)?[^\W\d]\w*", entry.strip()):
        raise ValueError(f"entry_point={_shown(entry)} must name a function or Solution().method")
    return entry.strip()


def _defines(source: str, name: str) -> bool:
    try:
        return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _shown(thing: Any) -> str:
    return repr(thing)[:SHOWN]
