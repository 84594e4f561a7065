"""Parse the test formats of code data sets into one `Suite`. Unknown formats raise ValueError.

    ["assert f(2) == 4", ...] or one text             HumanEval, MBPP, KodCode, AceCode: Python; see `python_tests.py`
    [{"input": "2\\n", "output": "4\\n"}, ...]        standard input and output; lists of lines too
    {"inputs": [...], "outputs": [...]}               the same in columns: APPS, TACO, PRIME, Eurus
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

from aligner.reward.python_tests import MODULES, PythonTests
from aligner.reward.sandboxed.wire import Endpoint, Pack

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
    """The tests that a program has to pass."""

    entry: str | None = None
    """The function under test, or Solution().method."""
    setup: list[str] = field(default_factory=list)
    """Python sources that run before the program and before the tests."""
    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    """{"entry", "args", "kwargs", "wanted", "unwrap"}; values packed."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """(standard input, standard output)."""
    scripts: PythonTests = field(default_factory=PythonTests)

    def plan(self, partial: bool) -> dict[str, Any]:
        """The input of `sandboxed/harness.py`, as JSON values."""
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
    """Parse a row's `tests`.

    Args:
        entry_point: the row's, if the tests do not name the function.
        setup: imports and definitions of the row, as texts or lists of lines.
        metadata: LiveCodeBench's metadata, an object or its JSON text, which may name the function.
        prefix: Python source of the prompt; used as setup if it defines the entry point, as in HumanEval.

    Raises:
        ValueError: unknown format, or tests that no wrong program could fail.
    """
    suite = Suite(entry=_name(entry_point, metadata), setup=[text for part in setup if (text := _lines(part, "setup"))])
    _read(tests, suite)
    if suite.entry and _defines(prefix, suite.entry.split(".")[-1]):
        suite.setup.append(prefix)
    if suite.pairs and not any(output.strip() for _, output in suite.pairs):
        raise ValueError("all expected outputs are empty, so a program that does nothing would pass")
    suite.scripts = PythonTests.read(suite.texts, suite.entry, suite.setup)
    if not (suite.calls or suite.pairs or suite.scripts.tests):
        raise ValueError(f"no test in tests={_shown(tests)}; {FORMS}")
    return suite


def _read(tests: Any, suite: Suite, depth: int = 0) -> None:
    """Add tests of any format to the suite."""
    if depth > 8:
        raise ValueError(f"tests are nested too deeply; {FORMS}")
    if isinstance(tests, str):
        decoded = _from_text(tests)
        if decoded is None:
            suite.texts.append(tests)
        else:
            _read(decoded, suite, depth + 1)
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
    """Decode JSON or Python's repr; None for Python code."""
    stripped = text.strip()
    if not stripped:
        raise ValueError(f"tests={text!r} is empty; {FORMS}")
    if re.fullmatch(r"eJ[\w+/=\s]{40,}", stripped):
        raise ValueError("tests are compressed (LiveCodeBench's private tests); decode them when the data is prepared")
    try:
        decoded = json.loads(stripped, strict=False)
    except (ValueError, RecursionError):
        if stripped[0] not in "[{":
            return None
        try:
            decoded = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    if not isinstance(decoded, str | list | dict):
        raise ValueError(f"tests={_shown(text)} is not a test; {FORMS}")
    return decoded


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
        for arguments, expected in zip(inputs, outputs, strict=True):
            _read_pair(arguments, expected, test, entry, suite)
    elif "output" in test:
        _read_pair(test.get("input"), test["output"], test, entry, suite)
    else:
        wrapped = [name for name in WRAPS if test.get(name) is not None]
        if not wrapped and test.get("public_test_cases") is not None:
            wrapped = [name for name in ("public_test_cases", "private_test_cases") if test.get(name)]
        if not wrapped:
            raise ValueError(f"a test {_shown(dict(test))} has an unknown format; {FORMS}")
        for name in wrapped:
            _read(test[name], suite, depth + 1)


def _column(test: Mapping[str, Any], name: str) -> Sequence[Any]:
    column = test.get(name)
    if isinstance(column, str):
        column = _from_text(column) if column.strip() else None
    if not isinstance(column, Sequence) or isinstance(column, str | bytes) or not len(column):
        raise ValueError(f"tests' {name} must be a non-empty list, not {_shown(column)}")
    return column


def _read_pair(arguments: Any, expected: Any, test: Mapping[str, Any], entry: str | None, suite: Suite) -> None:
    kind = str(test.get("testtype") or test.get("type") or "").lower()
    called = isinstance(arguments, str) and arguments.strip().startswith("Solution().")
    if kind in ("functional", "function_call", "call_based") or (
        kind not in ("stdin", "stdin_stdout") and (entry or called)
    ):
        if not entry and called:
            assert isinstance(arguments, str)
            entry = arguments.strip().split("(", 2)[0] + "()." + arguments.strip()[len("Solution().") :].split("(")[0]
        if not entry:
            raise ValueError("tests call a function that they do not name; give the row an entry_point or fn_name")
        suite.calls.append(_call(arguments, expected, entry))
    else:
        suite.pairs.append((_lines(arguments, "input") if arguments is not None else "", _lines(expected, "output")))


def _lines(text: Any, name: str) -> str:
    """Text from a text or a list of lines."""
    if isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(line, str) for line in text):
        return "\n".join(line.removesuffix("\n") for line in text)
    if not isinstance(text, str):
        raise ValueError(f"a test's {name} must be text or a list of lines, not {_shown(text)}")
    return text


def _call(arguments: Any, expected: Any, entry: str) -> dict[str, Any]:
    args: Any
    kwargs: Any = {}
    if isinstance(arguments, str):
        args, kwargs = _arguments(arguments)
    elif isinstance(arguments, Mapping):
        args, kwargs = [], dict(arguments)
    elif isinstance(arguments, Sequence):
        args = list(arguments)
    elif isinstance(arguments, int | float):
        args = [arguments]
    else:
        raise ValueError(f"a test's input must be arguments, not {_shown(arguments)}")
    # APPS wraps a result in a list of one; LiveCodeBench gives the result itself as text
    unwrap = isinstance(expected, list) and len(expected) == 1
    expected = _literal(expected) if isinstance(expected, str) else expected
    if len(args) == 1 and isinstance(args[0], dict):
        args = [_numbered(args[0])]
    return {
        "entry": entry,
        "args": _packed(args),
        "kwargs": _packed(kwargs),
        "wanted": _packed(expected),
        "unwrap": unwrap,
    }


def _packed(plain: Any) -> list[Any]:
    """Encode Python literals (also tuples, sets, bytes, infinities) as JSON for `sandboxed/wire.py`."""
    pack = Pack(Endpoint())
    return [pack.value(plain), pack.nodes]


def _numbered(keyed: dict[Any, Any]) -> dict[Any, Any]:
    """Integer keys of a dictionary, which JSON has turned into text; as the evaluators of APPS do for a single argument."""
    try:
        return {int(key): value for key, value in keyed.items()}
    except (ValueError, TypeError):
        return keyed


def _arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Parse arguments: one JSON value per line (LiveCodeBench), `nums = [1, 2], k = 3`, or a whole call (LeetCode)."""
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
    """Evaluate a literal; JSON's true, false and null are accepted."""
    names = {"true": True, "false": False, "null": None}

    class Spelled(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return ast.copy_location(ast.Constant(names[name.id]), name) if name.id in names else name

    return ast.literal_eval(Spelled().visit(node))


def _literal(text: str) -> Any:
    """Decode a result given as JSON or a Python literal; other text is returned unchanged."""
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
