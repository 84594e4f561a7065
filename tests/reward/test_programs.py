"""Programs in responses against tests: right, wrong, dishonest and endless ones, by the pool and by the rule alone."""

from __future__ import annotations

import os
from typing import Any

import pytest

from aligner.reward import programs
from aligner.reward.pool import RulePool, Status
from aligner.reward.programs import code_tests, python_block
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
    assert python_block("```\na\n```") == "a\n"
    assert python_block("  ```Python\n  a\n  ```") == "  a\n"
    assert python_block("```bash\nls\n```") is None
    assert python_block("no code") is None
    assert code_tests("p", "no code", tests=ASSERTS) == 0.0


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
    assert score(f"{DOUBLE}if __name__ == '__main__': print(f(int(input())))", [PAIRS[0], "assert True"]) == 0.0
    assert score(f"{DOUBLE}try: print(f(int(input())))\nexcept EOFError: pass", [PAIRS[0], ASSERTS[0]]) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "class E:\n  def __eq__(s, o): return True\nimport os\ndef f(x): os._exit(0)",
        "print('0\\n1\\n2')\ndef f(x): return 5",
        "import os; [os.write(fd, b'0\\n1\\n2\\n') for fd in (1, 2)]\ndef f(x): return 5",
        "def f(x):\n  while True: pass",
        "def f(x): raise SystemExit",
        "x = bytearray(10 << 30)\ndef f(x): return 2 * x",
        "import os\nwhile True: os.fork()",
    ],
)
def test_no_way_round_the_tests(code: str) -> None:
    assert score(code, seconds=1.0, partial=True) == 0.0


def test_a_test_that_hangs_leaves_those_before_it() -> None:
    code = "def f(x):\n  while x == -1: pass\n  return 2 * x"
    assert score(code, seconds=3.0, partial=True) == pytest.approx(2 / 3)


def test_the_secrets_of_a_worker_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    code = "import glob, os\nseen = str(dict(os.environ)) + str(glob.glob('/proc/*'))"
    assert score(code, ["assert 'secret' not in seen and '/proc/' not in seen"]) == 1.0


@pytest.mark.parametrize("tests", [[], None, 3, [3], [{"input": "2"}]])
def test_tests_that_cannot_be_read_are_a_failure_of_the_row(tests: Any) -> None:
    with pytest.raises(ValueError, match="test"):
        score(DOUBLE, tests)


def test_a_sandbox_that_cannot_be_made_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner.reward.sandbox._interpreter", lambda: os.path.realpath("/usr/bin/env"))
    with pytest.raises(SandboxError):
        score(DOUBLE)


def test_in_the_pool() -> None:
    responses = [DOUBLE, "def f(x): return 3", "import time; time.sleep(100)", DOUBLE]
    items = [{"prompt": "p", "response": fenced(code), "fields": {"tests": ASSERTS}} for code in responses]
    items.append({"prompt": "p", "response": fenced(DOUBLE), "fields": {"tests": 7}})
    weaker = {"tests": ASSERTS, "isolation": "none", "seconds": 100.0, "partial": True}  # not a row's to decide
    items.append({"prompt": "p", "response": fenced(f"{DOUBLE}while True: pass"), "fields": weaker})
    name = f"{programs.__name__}.code_tests"
    with RulePool(name, kwargs={"seconds": 3.0}, workers=2, timeout_s=30.0) as pool:
        scores = pool.score(items)
    assert [score.value for score in scores[:4]] == [1.0, 0.0, 0.0, 1.0]
    assert scores[4].status is Status.FAILED and "tests=7" in scores[4].detail
    assert (scores[5].value, scores[5].status) == (0.0, Status.OK)


@pytest.mark.parametrize(
    ("kwargs", "timeout_s", "said"),
    [
        ({"seconds": 5.0}, 5.5, r"reward\.components\.code\.timeout_s=5\.5 .* use 6\.0 or more"),
        ({"isolation": "docker"}, 20.0, r"kwargs\.isolation=docker is unknown; use namespaces or limits"),
        ({"seconds": 0}, 20.0, r"kwargs\.seconds=0 must be a positive number"),
        ({"memory_mb": 1.5}, 20.0, r"kwargs\.memory_mb=1\.5 must be a whole number"),
        ({"memory": 3}, 20.0, r"kwargs=.* do not fit reward\.components\.code\.rule"),
    ],
)
def test_what_cannot_work_is_refused_before_a_job(kwargs: dict[str, Any], timeout_s: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RulePool(f"{programs.__name__}.code_tests", kwargs, 1, timeout_s, "reward.components.code")


def test_no_isolation_is_refused_with_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "isolation_problem", lambda isolation: "unshare: Operation not permitted")
    said = programs._check({}, 20.0)
    assert said is not None and "unshare: Operation not permitted" in said and "kwargs.isolation=limits" in said
