"""Tests as data sets hold them: each form with a program that is right and one that is wrong, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from aligner.reward.programs import code_tests
from aligner.reward.sandbox import isolation_problem
from aligner.reward.suites import read_suite

needs_sandbox = pytest.mark.skipif(
    isolation_problem("namespaces") is not None, reason=f"no namespaces: {isolation_problem('namespaces')}"
)
DOUBLE, TRIPLE = "def f(x):\n    return 2 * x", "def f(x):\n    return 3 * x"
READS, PRINTS = "print(2 * int(input()))", "input(); print('no')"
TWO_SUM = "class Solution:\n    def total(self, nums: List[int], k: int) -> int:\n        return sum(nums) + k"
NO_SUM = "class Solution:\n    def total(self, nums, k):\n        return k"
HUMAN_EVAL = """from typing import List


def below(xs: List[int], t: int) -> bool:
    \"\"\" Are all numbers below t?
    >>> below([1, 2], 3)
    True
    \"\"\"
"""
CHECK = """

METADATA = {'author': 'x', 'dataset': 'test'}


def check(candidate):
    assert candidate([1, 2], 3)
    assert not candidate([1, 2], 2)
    assert candidate([], 0) == True, "nothing is below"

"""
BELOW, ABOVE = "def below(xs: List[int], t):\n    return all(x < t for x in xs)", "def below(xs, t):\n    return True"
NODES = """class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
def chain(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def values(node):
    found = []
    while node: found.append(node.val); node = node.next
    return found
def check(candidate):
    assert values(candidate(chain([1, 2, 3]))) == [3, 2, 1]
    assert candidate(None) is None
"""
REVERSED = """class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head: head.next, last, head = last, head, head.next
        return last"""
KEPT = "class Solution:\n    def reverse(self, head):\n        return head"
PYTEST = """from solution import f
import pytest

@pytest.mark.parametrize("x, wanted", [(1, 2), (4, 8), pytest.param(0, 0, id="none")])
def test_numbers(x, wanted):
    assert f(x) == pytest.approx(wanted)

class TestText:
    def setup_method(self):
        self.text = "ab"

    def test_text(self):
        assert f(self.text) == "abab"

def test_raises():
    with pytest.raises(TypeError, match="unsupported"):
        f(None)
"""
UNITTEST = """import unittest
from solution import f

class Numbers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.one = 1
    def test_one(self):
        self.assertEqual(f(self.one), 2)
    def test_error(self):
        with self.assertRaises(TypeError):
            f(None)

if __name__ == '__main__':
    unittest.main()
"""
COLUMNS = {"inputs": ["2\n", "5"], "outputs": ["4\n", "10"]}
CALLS = {"inputs": [[1], [4]], "outputs": [[2], [8]], "fn_name": "f"}
FUNCTIONAL = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional", "metadata": {"func_name": "total"}}]
# what -> (right program, wrong program, the row)
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one assert": (DOUBLE, TRIPLE, {"tests": "assert f(1) == 2"}),
    "asserts as JSON": (DOUBLE, TRIPLE, {"tests": json.dumps(["assert f(1) == 2", "assert f(0) == 0"])}),
    "JSON of JSON": (DOUBLE, TRIPLE, {"tests": json.dumps(json.dumps(["assert f(1) == 2"]))}),
    "repr of a list": (DOUBLE, TRIPLE, {"tests": repr(["assert f('a') == 'aa'"])}),
    "a comparison": (DOUBLE, TRIPLE, {"tests": ["f(1) == 2"]}),
    "imports first": (DOUBLE, TRIPLE, {"tests": ["import math", "assert math.isclose(f(1), 2)"]}),
    "a result first": (DOUBLE, TRIPLE, {"tests": ["x = f(1)", "assert x == 2"]}),
    "if and raise": (DOUBLE, TRIPLE, {"tests": "if f(1) != 2:\n    raise Exception('no')"}),
    "a main guard": (DOUBLE, TRIPLE, {"tests": "if __name__ == '__main__':\n    assert f(1) == 2"}),
    "a function that is called": (DOUBLE, TRIPLE, {"tests": "def verify():\n    assert f(1) == 2\nverify()\n"}),
    "pairs as JSON": (READS, PRINTS, {"tests": json.dumps([{"input": "2\n", "output": "4\n"}])}),
    "lists of lines": (READS, PRINTS, {"tests": [{"input": ["2"], "output": ["4", ""]}]}),
    "no input": ("print(repr(open(0).read()))", PRINTS, {"tests": [{"input": None, "output": "''"}]}),
    "APPS": (READS, PRINTS, {"input_output": json.dumps(COLUMNS)}),
    "APPS, an object": (READS, PRINTS, {"input_output": {**COLUMNS, "fn_name": None}}),
    "APPS, lines": (READS, PRINTS, {"input_output": {"inputs": [["2"]], "outputs": [["4"]]}}),
    "APPS, calls": (DOUBLE, TRIPLE, {"input_output": json.dumps(CALLS)}),
    "TACO, a method": (TWO_SUM, NO_SUM, {"input_output": {"inputs": [[[1, 2], 3]], "outputs": [6], "fn_name": "total"}}),
    "verl": (READS, PRINTS, {"ground_truth": json.dumps(COLUMNS)}),
    "open-r1": (READS, PRINTS, {"test_cases": [{"input": "2", "output": "4", "type": "stdin_stdout", "fn_name": None}]}),
    "PrimeIntellect": (DOUBLE, TRIPLE, {"test_cases": [{"input": [2], "output": 4, "type": "function_call", "fn_name": "f"}]}),
    "LiveCodeBench, stdin": (READS, PRINTS, {"tests": json.dumps([{"input": "2", "output": "4", "testtype": "stdin"}])}),
    "LiveCodeBench, calls": (TWO_SUM, NO_SUM, {"tests": json.dumps(FUNCTIONAL)}),
    "LiveCodeBench, metadata of the row": (
        TWO_SUM, NO_SUM,
        {"tests": [{**FUNCTIONAL[0], "metadata": {}}], "metadata": json.dumps({"func_name": "total"})},
    ),
    "LeetCode, arguments": (
        TWO_SUM, NO_SUM, {"input_output": [{"input": "nums = [1,2], k = 3", "output": "6"}], "entry_point": "Solution().total"},
    ),
    "LeetCode, calls": (TWO_SUM, NO_SUM, {"tests": [{"input": "Solution().total(nums = [1, 2], k = 3)", "output": "6"}]}),
    "LeetCode, asserts": (TWO_SUM, NO_SUM, {"tests": ["assert Solution().total(nums = [1, 2], k = 3) == 6"]}),
    "LeetCode, functional": (
        TWO_SUM, NO_SUM,
        {"tests": json.dumps({"functional": "def check(candidate):\n    assert candidate([1], 2) == 3\n\ncheck(Solution().total)"})},
    ),
    "LeetCode, nodes": (REVERSED, KEPT, {"test": NODES, "entry_point": "Solution().reverse"}),
    "numbers as keys": (
        "def f(d): return {k: v + 1 for k, v in d.items()}", "def f(d): return d",
        {"tests": {"inputs": [[{"1": 2}]], "outputs": [{"1": 3}], "fn_name": "f"}},
    ),
    "HumanEval": (BELOW, ABOVE, {"test": CHECK, "entry_point": "below"}),
    "HumanEval, one object": (BELOW, ABOVE, {"tests": {"test": CHECK, "entry_point": "below"}}),
    "HumanEval, the body": ("    return all(x < t for x in xs)", "    return True", {"test": CHECK, "entry_point": "below"}),
    "HumanEval, called": (BELOW, ABOVE, {"test": f"{CHECK}check(below)"}),
    "MBPP": (DOUBLE, TRIPLE, {"test_list": ["assert f(1) == 2"], "test_setup_code": "", "test_imports": []}),
    "MBPP, setup": (
        "def f(node): return node.value", "def f(node): return 0",
        {"test_list": ["assert f(root) == 3"], "test_setup_code": "class Node:\n    value = 3\nroot = Node()"},
    ),
    "MBPP, imports": (DOUBLE, TRIPLE, {"test_list": ["assert math.isclose(f(1), 2)"], "test_imports": ["import math"]}),
    "MBPP, a builtin's name": ("def sum(a, b): return a + b", "def sum(a, b): return a", {"test_list": ["assert sum(1, 2) == 3"]}),
    "pytest": (DOUBLE, TRIPLE, {"tests": {"pytest": PYTEST}}),
    "pytest, a module of any name": (DOUBLE, TRIPLE, {"tests": "from doubling import f\ndef test_f():\n    assert f(1) == 2"}),
    "unittest": (DOUBLE, TRIPLE, {"tests": UNITTEST}),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize(("right", "wrong", "row"), FORMS.values(), ids=FORMS)
def test_a_form_tells_right_from_wrong(right: str, wrong: str, row: dict[str, Any]) -> None:
    prompt = HUMAN_EVAL if row.get("entry_point") == "below" or "HumanEval" in str(row) else "p"
    for program, reward in ((right, 1.0), (wrong, 0.0)):
        assert code_tests(prompt, f"```python\n{program}\n```", seconds=60.0, **row) == reward


@needs_sandbox
def test_a_chat_prompt_may_hold_the_helpers() -> None:
    """HumanEval/32: the check uses a function of the prompt, and not what the program makes of it."""
    helper = "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef zero(xs):\n    'Find it.'\n"
    row = {
        "test": "def check(c):\n    assert abs(poly([1, 2], c([1, 2]))) < 1e-4",
        "entry_point": "zero",
        "seconds": 60.0,
    }
    programs = {"def zero(xs): return -0.5": 1.0, "def zero(xs): return 1": 0.0}
    programs["def poly(xs, x): return 0\ndef zero(xs): return 1"] = 0.0
    for prompt in (helper, f"Complete this:\n```python\n{helper}```\n"):
        for program, reward in programs.items():
            assert code_tests(prompt, f"```python\n{program}\n```", **row) == reward


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "no test"),
    "empty text": ("", "is empty"),
    "blank text": (" \n", "is empty"),
    "an empty list": ([], "no test"),
    "an empty list as JSON": ("[]", "no test"),
    "null": ("null", "is not a test"),
    "a number as JSON": ("3", "is not a test"),
    "true": ("true", "is not a test"),
    "a number": (7, "no test"),
    "numbers": ([3], "a test must be text or an object, not 3"),
    "lists": ([["2", "4"]], "a test must be text or an object"),
    "an empty object": ({}, "has an unknown format"),
    "an unknown object": ({"question": "x"}, "has an unknown format"),
    "an input alone": ([{"input": "2"}], "has an unknown format"),
    "a number as input": ([{"input": 2, "output": "4"}], "input must be text or a list of lines, not 2"),
    "an object as input": ([{"input": {}, "output": "4"}], "input must be text"),
    "numbers as lines of input": ([{"input": [2], "output": "4"}], "input must be text"),
    "a number as output": ([{"input": "2", "output": 4}], "output must be text"),
    "null as output": ([{"input": "2", "output": None}], "output must be text"),
    "empty outputs": ([{"input": "2", "output": ""}, {"output": "\n"}], "a program that does nothing would pass"),
    "columns of none": ({"inputs": [], "outputs": []}, "inputs must be a non-empty list"),
    "columns of other lengths": ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs and 1 outputs"),
    "one column": ({"inputs": ["1"]}, "outputs must be a non-empty list"),
    "a call of nobody": (
        [{"input": "1", "output": "1", "testtype": "functional"}],
        "give the row an entry_point or fn_name",
    ),
    "a bad name": ({"inputs": [[1]], "outputs": [1], "fn_name": "f(x)"}, "must name a function"),
    "bad arguments": (
        {"inputs": ["a b"], "outputs": ["1"], "fn_name": "f"},
        "is neither JSON, one argument a line, nor a call",
    ),
    "null as arguments": ({"inputs": [None], "outputs": [1], "fn_name": "f"}, "must be arguments"),
    "compressed": ("eJxrYJmqwQABPdxTelKL8/Ozi0tSixQUyjKLSxJzcjLTS4sSSzLz8wAAXV0PRQ==", "tests are compressed"),
    "no Python": ("def f(:", "a test is not Python"),
    "JSON that is cut off": ('[{"input": "1", "outp', "a test is not Python"),
    "an answer": ("42 apples", "a test is not Python"),
    "a constant": ("assert True", "assert nothing"),
    "a constant comparison": ("assert 1 == 1", "assert nothing"),
    "only a call": (["f(1)"], "assert nothing"),
    "only a comment": (["# f"], "assert nothing"),
    "check without a name": (CHECK, "nothing calls check(candidate) of the tests; give the row an entry_point"),
    "what nobody calls": ("def verify():\n    assert f(1) == 2", "nothing calls what the tests define: verify"),
    "a fixture": ("def test_f(capsys):\n    assert f(1) == 2", "takes capsys: fixtures are not supported"),
    "a fixture of a class": (
        "class TestF:\n    def test_f(self, tmp_path):\n        assert f(1) == 2",
        "takes tmp_path",
    ),
    "a fixture of its own": (
        "import pytest\n@pytest.fixture\ndef one():\n    return 1\ndef test_f():\n    assert f(1)",
        "fixture one",
    ),
    "files": (
        "def test_f():\n    with open('a', 'w') as file:\n        file.write('x')\n    assert f('a')",
        "the tests use files (open('a', 'w'))",
    ),
    "indirect": ("@pytest.mark.parametrize('x', [1], indirect=True)\ndef test_f(x):\n    assert f(x)", "indirect"),
}


@pytest.mark.parametrize(("tests", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_a_failed_row(tests: Any, said: str) -> None:
    """Whatever the response is: one without a program says so too."""
    with pytest.raises(ValueError, match=re.escape(said)):
        code_tests("p", "no program", tests=tests)


def test_arguments_of_calls() -> None:
    """As LiveCodeBench, LeetCode and APPS write them; `null` and `true` are JSON's, single quotes Python's."""
    given = ["1\n[2]", "a = 1, b = [null]", "S().f(1, b = true)", "'x'\n(1, 2)", [1, [2]], {"a": 1}, "", "[1,\n2]", 5]
    suite = read_suite({"inputs": given, "outputs": ["1"] * len(given), "fn_name": "f"})
    found = [(call["args"], call["kwargs"]) for call in suite.calls]
    assert [args[1][0][1] for args, _ in found] == [[1, [1]], [], [1], ["x", [1]], [1, [1]], [], [], [[1]], [5]]
    assert [len(kwargs[1][0][1]) for _, kwargs in found] == [0, 2, 1, 0, 0, 1, 0, 0, 0]


def test_the_first_tests_of_a_row_count() -> None:
    row = {"tests": ["assert f(1) == 2"], "test_list": ["assert f(1) == 9"], "test": "also not read ("}
    assert code_tests("p", "no program", **row) == 0.0
