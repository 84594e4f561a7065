"""What in a text of Python is a test, by hand."""

from __future__ import annotations

import pytest

from aligner.reward.python_tests import PythonTests

CASES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "statements": ("x = f(1)\nassert x == 2", [("body", "")]),
    "called functions are part of the text": ("def test_a():\n    assert f(1)\ntest_a()", [("body", "")]),
    "functions by name": ("def helper():\n    assert f(0)\ndef test_a():\n    helper()", [("function", "test_a")]),
    "statements and functions": ("assert f(1)\ndef test_a():\n    assert f(2)", [("body", ""), ("function", "test_a")]),
    "check": ("def check(candidate):\n    assert candidate(1)", [("check", "check")]),
    "check, called": ("def check(candidate):\n    assert candidate(1)\ncheck(f)", [("body", "")]),
    "a candidate by another name": ("def test(func):\n    assert func(1)", [("check", "test")]),
    "parametrized": ("@pytest.mark.parametrize('a, b', [(1, 2)])\ndef test_a(a, b):\n    assert f(a)", [("function", "test_a")]),
    "parametrized by a list": ("@mark.parametrize(['a'], [1])\ndef test_a(a, b=1):\n    assert f(a)", [("function", "test_a")]),
    "patched": ("@patch('builtins.input')\ndef test_a(given):\n    assert f(1)", [("function", "test_a")]),
    "patched with something": ("@patch('x.y', 3)\ndef test_a():\n    assert f(1)", [("function", "test_a")]),
    "a class": ("class TestA:\n    x = 1\n    def test_b(self):\n        assert f(1)\n    def other(self): pass", [("method", "test_b")]),
    "a case": ("class A(unittest.TestCase):\n    def test_b(self):\n        self.assertTrue(f(1))", [("method", "test_b")]),
    "a runner at the end": ("def test_a():\n    assert f(1)\npytest.main()", [("function", "test_a")]),
    "a main guard of a runner": ("def test_a():\n    assert f(1)\nif __name__ == '__main__':\n    unittest.main()", [("function", "test_a")]),
    "a main guard that tests": ("if __name__ == '__main__':\n    assert f(1)", [("body", "")]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "tests"), CASES.values(), ids=CASES)
def test_the_tests_in_a_text(text: str, tests: list[tuple[str, str]]) -> None:
    found = PythonTests.read([text], "f", [])
    assert [(test["kind"], test.get("name", "")) for test in found.tests] == tests
    assert (found.name == "__main__") == ("that tests" in next(name for name, case in CASES.items() if case[0] == text))


def test_a_text_that_asserts_nothing_goes_with_the_next() -> None:
    found = PythonTests.read(["import math", "def helper(): pass", "assert f(1)", "assert f(2)"], None, [])
    assert len(found.sources) == len(found.tests) == 2
    assert found.sources[0].startswith("import math\ndef helper()")


def test_what_the_setup_announces_and_what_both_sides_have() -> None:
    setup = "class Node:\n    def __init__(self): self.x = 1\ndef f(x):\n    'Doc.'\ndef g(x): return x\nclass Solution:\n    def f(self): ..."
    text = "import math\nfrom answers import f\nclass Other: y = 2\nclass TestF:\n    def test_f(self):\n        assert f(Other())"
    found = PythonTests.read([text], "f", [setup])
    assert set(found.dropped) == {"f", "Solution"}
    assert found.shared == ["Node", "Other"]
    assert found.pieces == ["import math", "from answers import f", "class Other:\n    y = 2"]
    assert found.imports == {"answers": ["f"]}
