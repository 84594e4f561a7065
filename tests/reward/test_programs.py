"""Programs in responses against tests: right, wrong, dishonest and endless ones, by the pool and by the rule alone."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from aligner.reward import programs
from aligner.reward.pool import RulePool, Status
from aligner.reward.programs import code_tests, python_block, same_output
from aligner.reward.sandbox import SandboxError, isolation_problem

pytestmark = pytest.mark.skipif(
    isolation_problem("namespaces") is not None, reason=f"no namespaces: {isolation_problem('namespaces')}"
)
DOUBLE = "def f(x):\n    return 2 * x\n"
ASSERTS = ["assert f(2) == 4", "assert f(0) == 0", "assert f(-1) == -2"]
PAIRS = [{"input": "2\n", "output": "4"}, {"input": "-3\n", "output": "-6\n\n"}]


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


def score(code: str, tests: Any = ASSERTS, **settings: Any) -> float:
    return code_tests("p", fenced(code), tests=tests, **{"seconds": 60.0, **settings})


def test_the_last_block_counts() -> None:
    assert python_block("```python\na\n```\ntext\n```py\nb\nc\n```") == "b\nc\n"
    assert code_tests("p", "no code", tests=ASSERTS) == 0.0
    two = f"```python\n{DOUBLE}```\nUse it:\n```python\nprint(f(1))\n```\n"
    assert [code_tests("p", two, tests=ASSERTS, block=block) for block in ("last", "first", "all")] == [0.0, 1.0, 1.0]


def test_asserts() -> None:
    assert score(DOUBLE) == 1.0
    assert score("def f(x): return x * x", partial=False) == 0.0
    assert score("def f(x): return x * x", partial=True) == pytest.approx(2 / 3)  # 4, 0, but 1 for -2
    assert score(DOUBLE, "assert f(2) == 4\nassert f(3) == 6") == 1.0
    assert score("def f(:", partial=True) == 0.0
    assert score("raise ValueError", partial=True) == 0.0


def test_input_and_output() -> None:
    assert score("print(2 * int(input()))", PAIRS) == 1.0
    assert score("print(4)", PAIRS) == 0.0
    assert score("print(4)", PAIRS, partial=True) == 0.5
    assert score("print(2 * int(input())); raise SystemExit(1)", PAIRS) == 0.0
    assert score("import sys\nprint(2 * int(input()), ' ')\nprint('noise', file=sys.stderr)", PAIRS) == 1.0
    both = [PAIRS[0], "assert f(1) == 2"]
    assert score(f"{DOUBLE}if __name__ == '__main__': print(f(int(input())))", both) == 1.0
    assert score(f"{DOUBLE}print(f(int(input())))", both) == 0.0, "to load it is to read input that is not there"
    assert score(f"{DOUBLE}try: print(f(int(input())))\nexcept EOFError: pass", both) == 1.0


@pytest.mark.parametrize(
    ("printed", "wanted", "right"),
    [
        ("4\n", "4", True),
        ("  4 \n\n", "4\n", True),
        ("1\n2\n", "1 \n 2", True),
        ("1 2\n", "1\n2", False),
        ("1\n\n2", "1\n2", False),
        ("Yes", "YES", False),
        ("0.30000000000000004", "0.3", True),
        ("0.3001", "0.3", False),
        ("1e3 x", "1000.0 x", True),
        ("3", "3.0", True),
        ("100000", "100001", False),
        ("100000000000000001", "100000000000000002", False),
        ("007", "7", False),
        ("b a", "a b", False),
        ("nan", "nan", True),
        ("", "\n", True),
        ("a\r\nb", "a\nb", True),
    ],
)
def test_outputs_that_are_the_same(printed: str, wanted: str, right: bool) -> None:
    assert same_output(printed, wanted) is right


HACKS = {
    "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "kill": "import os; os.kill(os.getpid(), 9)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit",
    "AssertionError caught": "class B(BaseException): pass\ndef f(x): raise B",
    "exit at the second": "import sys\ndef f(x, n=[]):\n    n.append(x)\n    return 4 if len(n) == 1 else sys.exit(0)",
    "numbers printed": "print('0\\n1\\n2\\n\"done\"', flush=True)\ndef f(x): return 5",
    "numbers to every descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'0\\n1\\n2\\n\"done\"\\n')\n    except OSError: pass\ndef f(x): return 5"
    ),
    "numbers from a thread": (
        "import threading, os\ndef say():\n    while True:\n        for fd in (0, 1, 2): os.write(fd, b'0\\n1\\n2\\n')\n"
        "threading.Thread(target=say, daemon=True).start()\ndef f(x): return 5"
    ),
    "atexit": "import atexit, os\natexit.register(lambda: os.write(1, b'0\\n1\\n2\\n'))\ndef f(x): return 5",
    "always equal": "class A:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\ndef f(x): return A()",
    "an equal number": "class A(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return A()",
    "a class for the function": "class f:\n    def __new__(c, x): return object.__new__(c)\n    def __eq__(s, o): return True",
    "compile": "import builtins\nr = builtins.compile\nbuiltins.compile = lambda *a, **k: r('0', '', 'exec')\ndef f(x): return 5",
    "exec": "import builtins\nbuiltins.exec = lambda *a, **k: None\ndef f(x): return 5",
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for v in [*frame.f_globals.values(), *frame.f_locals.values()]:\n"
        "        if isinstance(v, dict) and 'tests' in v: v['tests'] = []\n    frame = frame.f_back\ndef f(x): return 5"
    ),
    "forged replies": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if type(o).__name__ == 'Link':\n"
        "            for _ in range(9): o.send(dict(value=True, after={}, nodes=[], printed=''))\n    return 5"
    ),
    "a forged greeting": (
        "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Link': o.send(dict(broken='x')); o.send(dict(names=3))\n"
        "def f(x): return 5"
    ),
    "endless": "def f(x):\n  while True: pass",
    "memory": "x = bytearray(10 << 30)\ndef f(x): return 2 * x",
    "fork bomb": "import os\nwhile True: os.fork()",
}


@pytest.mark.parametrize("code", HACKS.values(), ids=HACKS)
def test_no_way_round_the_tests(code: str) -> None:
    assert score(code, seconds=1.5, partial=True) < 0.5


FORGERIES = {
    "abs": ("def abs(x): return 0\ndef f(x): return 5", "assert abs(f(2) - 4) < 1e-9"),
    "len": ("def len(x): return 3\ndef f(x): return []", "assert len(f(3)) == 3"),
    "set": ("def set(x): return 0\ndef f(x): return [5]", "assert set(f(2)) == set([4])"),
    "sorted": ("import builtins\nbuiltins.sorted = lambda *a: []\ndef f(x): return [5]", "assert sorted(f(2)) == [4]"),
    "isclose": (
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 5",
        "import math\nassert math.isclose(f(2), 4)",
    ),
    "a module that the tests forgot to import": (
        "class math:\n  isclose = lambda *a: True\ndef f(x): return 5",
        "assert math.isclose(f(2), 4)",
    ),
    "a difference of 0": (
        "class A:\n  def __sub__(s, o): return 0.0\ndef f(x): return A()",
        "assert abs(f(2) - 4) < 1e-9",
    ),
    "less than all": ("class A:\n  def __lt__(s, o): return True\ndef f(x): return A()", "assert f(2) < 5"),
    "contains all": ("class A:\n  def __contains__(s, o): return True\ndef f(x): return A()", "assert 4 in f(2)"),
    "a list that equals": (
        "class A(list):\n  def __eq__(s, o): return True\ndef f(x): return A()",
        "assert f(2) == [4]",
    ),
    "assertEqual": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 5",
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(2), 4)",
    ),
    "check": ("def check(c): pass\ndef f(x): return 5", "def check(c):\n    assert c(2) == 4\ncheck(f)"),
    "pytest.raises": (
        "import sys\nclass P:\n  def raises(*a): return open('/dev/null')\nsys.modules['pytest'] = P\ndef f(x): return 5",
        "import pytest\ndef test_f():\n    with pytest.raises(ValueError):\n        f(2)",
    ),
    "the other function": (
        "def g(*a): return 0\ndef f(x): return 5",
        "def check(c):\n    assert g(c(2)) == 0",
    ),
}


@pytest.mark.parametrize(("code", "tests"), FORGERIES.values(), ids=FORGERIES)
def test_what_a_program_redefines_is_its_own(code: str, tests: str) -> None:
    """A right program passes each of these."""
    setup = "def g(x):\n    return x - 4\n"
    given = {"entry_point": "f", "test_setup_code": setup}
    assert score(code, tests, **given) == 0.0
    right = {
        "len": "[0] * x",
        "set": "[2 * x]",
        "sorted": "[2 * x]",
        "contains all": "[2 * x]",
        "a list that equals": "[2 * x]",
    }
    name = next(name for name, case in FORGERIES.items() if case == (code, tests))
    body = "raise ValueError" if name == "pytest.raises" else f"return {right.get(name, '2 * x')}"
    assert score(f"def f(x): {body}", tests, **given) == 1.0


def test_a_test_that_hangs_leaves_those_before_it() -> None:
    code = "def f(x):\n  while x == -1: pass\n  return 2 * x"
    assert score(code, seconds=3.0, partial=True) == pytest.approx(2 / 3)


def test_the_secrets_of_a_worker_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    code = "import glob, os\nseen = str(dict(os.environ)) + str(glob.glob('/proc/*'))"
    assert score(code, ["assert 'secret' not in seen and '/proc/' not in seen"]) == 1.0


def test_the_program_does_not_see_its_tests() -> None:
    """Neither in its memory, nor in files, nor among its arguments."""
    code = """
import gc, os, sys
def f(x):
    texts = [o for o in gc.get_objects() if isinstance(o, (str, bytes, list, dict))]
    files = [open(name).read() for name in os.listdir() if os.path.isfile(name)]
    return "a-mark" + "-of-tests" in str(texts) + str(files) + str(sys.argv)
"""
    assert score(code, ["assert f('a-mark') == False, 'a-mark-of-tests'"]) == 1.0


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (["import numpy as np\nassert f(1) == 2"], "the tests import an unavailable module: No module named 'numpy'"),
        (["for x in []:\n    assert f(x) == 2"], "the tests assert nothing and never use the program"),
        (["import os\nos._exit(0)\nassert f(2) == 4"], "the tests end their own process, with code 0"),
        (["assert 1 + 1 == int('3')"], "the tests fail without the program: AssertionError"),
        ("class A(B):\n    pass\nassert A().f(2) == 4", "the tests extend a class of the program"),
    ],
)
def test_tests_that_are_at_fault_give_no_verdict(tests: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"no verdict: {said}"):
        score(f"{DOUBLE}class B: pass", tests)


def test_a_setup_that_raises_gives_no_verdict() -> None:
    with pytest.raises(ValueError, match="setup code raises ZeroDivisionError"):
        score(DOUBLE, test_setup_code="1 / 0")


def test_a_sandbox_that_cannot_be_made_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner.reward.sandbox._interpreter", lambda: os.path.realpath("/usr/bin/env"))
    with pytest.raises(SandboxError):
        score(DOUBLE)


def test_in_the_pool() -> None:
    responses = [DOUBLE, "def f(x): return 3", "import time; time.sleep(100)", DOUBLE]
    items = [{"prompt": "p", "response": fenced(code), "fields": {"tests": ASSERTS}} for code in responses]
    items.append({"prompt": "p", "response": fenced(DOUBLE), "fields": {"tests": 7}})
    weaker = {"tests": ASSERTS, "isolation": "none", "seconds": 100.0, "partial": True, "block": "first"}
    items.append(
        {"prompt": "p", "response": fenced(f"{DOUBLE}while True: pass"), "fields": weaker}
    )  # not a row's to decide
    items.append({"prompt": "p", "response": fenced(DOUBLE), "fields": {"test_list": json.dumps(ASSERTS)}})
    name = f"{programs.__name__}.code_tests"
    with RulePool(name, kwargs={"seconds": 3.0}, workers=2, timeout_s=30.0) as pool:
        scores = pool.score(items)
    assert [score.value for score in scores[:4]] == [1.0, 0.0, 0.0, 1.0]
    assert scores[4].status is Status.FAILED and "tests=7" in scores[4].detail
    assert (scores[5].value, scores[5].status) == (0.0, Status.OK)
    assert scores[6].value == 1.0


@pytest.mark.parametrize(
    ("kwargs", "timeout_s", "said"),
    [
        ({"seconds": 5.0}, 5.5, r"reward\.components\.code\.timeout_s=5\.5 .* use 6\.0 or more"),
        ({"isolation": "docker"}, 20.0, r"kwargs\.isolation=docker is unknown; use namespaces or limits"),
        ({"block": "second"}, 20.0, r"kwargs\.block=second is unknown; use last, first, all or text"),
        ({"seconds": 0}, 20.0, r"kwargs\.seconds=0 must be a positive number"),
        ({"memory_mb": 1.5}, 20.0, r"kwargs\.memory_mb=1\.5 must be a whole number"),
        ({"memory": 3}, 20.0, r"kwargs\.memory: reward\.components\.code\.rule=.* has no such argument; it has"),
    ],
)
def test_what_cannot_work_is_refused_before_a_job(kwargs: dict[str, Any], timeout_s: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RulePool(f"{programs.__name__}.code_tests", kwargs, 1, timeout_s, "reward.components.code")


def test_no_isolation_is_refused_with_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "isolation_problem", lambda isolation: "unshare: Operation not permitted")
    said = programs._check({}, 20.0)
    assert said is not None and "unshare: Operation not permitted" in said and "kwargs.isolation=limits" in said
