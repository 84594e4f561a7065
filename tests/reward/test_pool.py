"""Rules in real worker processes: what hangs, dies or raises costs its own row and nothing else."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aligner.reward import rules
from aligner.reward.pool import RulePool, Score, Status

RULES = """
import ctypes, os, signal, subprocess, sys, time
from aligner.reward.rules import Unparsable

def act(prompt, response, **fields):
    what, _, value = response.partition(" ")
    if what == "value": return float(value)
    if what == "echo": return fields["given"]
    if what == "loop":
        while True: pass
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: pass
    if what == "sleep": time.sleep(float(value))
    if what == "eat": return len(bytearray(int(value) << 20))
    if what == "child": return subprocess.run([sys.executable, "-c", f"bytearray({value} << 20)"]).returncode
    if what == "raise": raise KeyError(value)
    if what == "unparsable": raise Unparsable(value)
    if what == "exit": os._exit(int(value))
    if what == "sys.exit": sys.exit(int(value))
    if what == "segfault": ctypes.string_at(0)
    if what == "nan": return float("nan")
    if what == "inf": return float("inf")
    if what == "text": return "1.0"
    if what == "nothing": return None
    if what == "true": return True
    if what == "pid": return os.getpid()
    if what == "heavy": return len({"torch", "vllm", "transformers"} & set(sys.modules))
    if what == "cuda": return len(os.environ["CUDA_VISIBLE_DEVICES"])
    return 1.0

def named(prompt, response, answer, scale=1.0): return scale * (response == answer)
def one_argument(prompt): return 1.0
def bad_text(prompt, response):
    class Bad(Exception):
        def __str__(self): raise RuntimeError("no text")
    raise Bad()
"""
CLOSING_S = 30


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "my_rules.py"
    path.write_text(RULES)
    return path


@pytest.fixture(scope="module")
def pool(rule_file: Path) -> Iterator[RulePool]:
    with RulePool(f"{rule_file}:act", workers=2, timeout_s=1.0) as pool:
        yield pool


def items(*responses: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": "p", "response": response, "fields": fields} for response in responses]


def test_a_big_batch_keeps_its_order(pool: RulePool) -> None:
    scores = pool.score(items(*(f"value {i}" for i in range(2000))))
    assert [score.value for score in scores] == list(range(2000))
    assert {score.status for score in scores} == {Status.OK}
    assert all(0 <= score.seconds < 1 for score in scores)


def test_each_failure_is_told_apart_and_the_other_rows_are_unharmed(pool: RulePool) -> None:
    cases = {
        "raise x": (Status.FAILED, "KeyError at my_rules.py:"),
        "sys.exit 4": (Status.FAILED, "SystemExit"),
        "exit 3": (Status.FAILED, "the worker died: exit code 3"),
        "exit 0": (Status.FAILED, "the worker died: exit code 0"),
        "segfault": (Status.FAILED, "the worker died: killed by SIGSEGV"),
        "nan": (Status.FAILED, "the rule returned nan"),
        "inf": (Status.FAILED, "the rule returned inf"),
        "text": (Status.FAILED, "the rule returned '1.0' (str), not a number"),
        "nothing": (Status.FAILED, "the rule returned None (NoneType), not a number"),
        "unparsable why": (Status.UNPARSABLE, "why"),
        "loop": (Status.TIMEOUT, "no score within reward.timeout_s=1.0"),
        "sleep 30": (Status.TIMEOUT, "no score within reward.timeout_s=1.0"),
    }
    responses = [response for i, bad in enumerate(cases) for response in (bad, f"value {i}", f"value -{i}")]
    start = time.monotonic()
    scores = pool.score(items(*responses))
    assert time.monotonic() - start < 15
    for i, (status, detail) in enumerate(cases.values()):
        bad, *good = scores[3 * i : 3 * i + 3]
        assert bad.status is status
        assert detail in bad.detail
        assert math.isnan(bad.value)
        assert [(score.value, score.status, score.detail) for score in good] == [
            (float(i), Status.OK, ""),
            (-float(i), Status.OK, ""),
        ]
    assert pool.score(items("true"))[0].value == 1.0


def test_a_slow_row_that_ends_just_late_is_late_all_the_same(pool: RulePool) -> None:
    (score,) = pool.score(items("sleep 1.01"))
    assert score.status is Status.TIMEOUT


def test_a_rule_that_ignores_the_request_to_end_is_killed(pool: RulePool) -> None:
    start = time.monotonic()
    hung, good = pool.score(items("deaf", "value 5"))
    assert (hung.status, good.value) == (Status.TIMEOUT, 5.0)
    assert time.monotonic() - start < 10


def test_workers_see_neither_torch_nor_a_gpu(pool: RulePool) -> None:
    heavy, cuda = pool.score(items("heavy", "cuda"))
    assert (heavy.value, cuda.value) == (0.0, 0.0)


def test_a_worker_killed_between_two_batches_is_replaced(pool: RulePool) -> None:
    for _ in range(3):
        (before,) = pool.score(items("pid"))
        os.kill(int(before.value), signal.SIGKILL)
        time.sleep(0.3)
        after = pool.score(items("pid", "value 2"))
        assert [score.status for score in after] == [Status.OK, Status.OK]
        assert after[0].value != before.value


def test_a_row_that_eats_memory_fails_alone(rule_file: Path) -> None:
    """2 GiB are more than 512 MiB, in the worker and in what it starts; 100 MiB are not."""
    with RulePool(f"{rule_file}:act", workers=1, timeout_s=20, memory_bytes=512 << 20) as pool:
        (pid,) = pool.score(items("pid"))
        eaten, small, child, after = pool.score(items("eat 2048", "eat 100", "child 2048", "pid"))
    assert (eaten.status, math.isnan(eaten.value)) == (Status.FAILED, True)
    assert "MemoryError at my_rules.py:" in eaten.detail
    assert "reward.memory_mib" in eaten.detail
    assert small.value == 100 << 20
    assert child.value == 1
    assert after.value == pid.value, "the worker lives on"


@pytest.mark.matrix
def test_a_rule_that_always_sleeps_is_given_up(rule_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 rows of 1 s each are not waited for; a rule that answered once is tried on every row."""
    monkeypatch.setattr("aligner.reward.pool.GIVE_UP_S", 3.0)
    with RulePool(f"{rule_file}:act", workers=2, timeout_s=1.0) as pool:
        start = time.monotonic()
        scores = pool.score(items(*["sleep 100"] * 100))
        assert time.monotonic() - start < 50
        assert {score.status for score in scores} == {Status.TIMEOUT}
        assert "no score within reward.timeout_s=1.0" in scores[0].detail
        assert "not tried: the first" in scores[-1].detail
        scores = pool.score(items("value 1", *["sleep 100"] * 8, "value 2"))
        assert [score.status for score in scores] == [Status.OK, *[Status.TIMEOUT] * 8, Status.OK]


def test_what_is_being_scored_is_told(rule_file: Path) -> None:
    """By another thread, while the rows before are done and those behind wait for a worker."""
    with RulePool(f"{rule_file}:act", workers=1, timeout_s=20) as pool:
        seen, done = [], []
        pool.progress = lambda: done.append(pool.under_way())
        scoring = threading.Thread(target=pool.score, args=(items("value 1", "sleep 2", "value 3"),))
        scoring.start()
        while scoring.is_alive():
            seen.append(pool.under_way())
            time.sleep(0.05)
        scoring.join()
        assert seen.count([1]) > 10, seen
        assert len(done) == 3
        assert pool.under_way() == []


def test_every_row_may_kill_its_worker(rule_file: Path) -> None:
    with RulePool(f"{rule_file}:act", workers=3, timeout_s=100) as pool:
        scores = pool.score(items(*["exit 7", "value 1"] * 20))
    assert [score.status for score in scores] == [Status.FAILED, Status.OK] * 20


def test_a_row_that_cannot_be_sent_fails_alone(pool: RulePool) -> None:
    rows = items("value 1") + items("value 2", unsendable=lambda: None) + items("value 3")
    scores = pool.score(rows)
    assert [score.status for score in scores] == [Status.OK, Status.FAILED, Status.OK]


@pytest.mark.parametrize("bad", ["exit 3", "loop", "raise x", "unsendable"])
def test_rows_that_travel_together_fail_alone(rule_file: Path, bad: str) -> None:
    with RulePool(f"{rule_file}:act", workers=1, timeout_s=1.0) as pool:
        pool.score(items(*["pid"] * 8))  # fast rows, so the next ones travel together
        whole = items(*["pid"] * 8)
        whole[2] = items("pid", unsendable=lambda: None)[0] if bad == "unsendable" else items(bad)[0]
        tasks = {len(chunk) for chunk in pool._chunks(range(8))}
        scores = pool.score(whole)
    assert tasks == {4}
    failed = Status.TIMEOUT if bad == "loop" else Status.FAILED
    assert [score.status for score in scores] == [Status.OK] * 2 + [failed] + [Status.OK] * 5


def test_no_rows_no_scores(pool: RulePool) -> None:
    assert pool.score([]) == []


def test_a_rules_own_error_may_be_broken(rule_file: Path) -> None:
    with RulePool(f"{rule_file}:bad_text") as pool:
        (score,) = pool.score(items("x"))
    assert score.status is Status.FAILED
    assert "no text" in score.detail


def test_a_rule_gets_the_fields_that_it_names(rule_file: Path) -> None:
    fields = {"prompt": "p", "answer": "b", "source": "not wanted"}
    with RulePool(f"{rule_file}:named", kwargs={"scale": 3.0}) as pool:
        right, wrong = pool.score(items("b", "c", **fields))
        (own,) = pool.score(items("b", scale=5.0, **fields))
        (missing,) = pool.score(items("b"))
    assert (right.value, wrong.value, own.value) == (3.0, 0.0, 5.0)
    assert missing.status is Status.FAILED
    assert "missing 1 required positional argument: 'answer'" in missing.detail


def test_a_rule_of_the_package_and_the_folder_where_the_job_stands(
    rule_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RulePool("aligner.reward.rules.answer_after_marker", workers=1) as pool:
        right, wrong = pool.score(items("#3", "3", answer="3"))
    assert [right.value, wrong.value] == [1.0, 0.0]
    monkeypatch.chdir(rule_file.parent)
    with RulePool("my_rules.py:act", workers=1) as pool:
        monkeypatch.chdir("/")
        scores = pool.score(items("exit 1", "value 2"))
    assert [score.status for score in scores] == [Status.FAILED, Status.OK]


FORMS = """
import functools
class Class:
    def __init__(self, prompt, response): pass
    def __call__(self, prompt, response): return 1.0
class Async:
    async def __call__(self, prompt, response): return 1.0
instance, instance_async = Class("", ""), Async()
async def later(prompt, response): return 1.0
async def later_one_by_one(prompt, response): yield 1.0
def one_by_one(prompt, response, scale=1.0): yield scale
bound = functools.partial(one_by_one, scale=2.0)
"""


def test_an_instance_that_can_be_called_is_a_rule(tmp_path: Path) -> None:
    (tmp_path / "forms.py").write_text(FORMS)
    with RulePool(f"{tmp_path}/forms.py:instance", workers=1) as pool:
        assert [score.value for score in pool.score([{"prompt": "", "response": "", "fields": {"more": 1}}])] == [1.0]
        assert pool.needs() == frozenset()


@pytest.mark.parametrize(
    ("signature", "kwargs", "needed"),
    [
        ("prompt, response, **fields", {}, set()),
        ("prompt, response, *, answer, scale=1.0", {}, {"answer"}),
        ("prompt, response, answer, level", {"level": 3}, {"answer"}),
        ("question, given, *, prompt, answer=None", {}, set()),
    ],
)
def test_the_fields_without_which_a_row_has_no_score(
    signature: str, kwargs: dict[str, Any], needed: set[str], tmp_path: Path
) -> None:
    (tmp_path / "rule.py").write_text(f"def rule({signature}): return 1.0")
    with RulePool(f"{tmp_path}/rule.py:rule", kwargs, workers=1) as pool:
        assert pool.needs() == needed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rule": "absent.rule"}, r"reward\.rule='absent\.rule': absent cannot be imported"),
        ({"rule": "aligner.reward.rules.__doc__"}, r"reward\.rule=.* is a str, not a function"),
        ({"rule": "FILE:one_argument"}, r"reward\.rule=.* must take \(prompt, response, \*\*fields\)"),
        ({"rule": "FILE:named", "kwargs": {"size": 3}}, r"reward\.kwargs\.size: .* has no such argument; it has"),
        ({"rule": "FILE:named", "kwargs": {"prompt": "x"}}, r"reward\.kwargs\.prompt: .* remove it"),
        ({"rule": "FORMS:Class"}, r"reward\.rule=.* is a class, .*give a function"),
        ({"rule": "FORMS:instance_async"}, r"reward\.rule=.* is async, .*give a function"),
        ({"rule": "FORMS:later"}, r"reward\.rule=.* is async, .*give a function"),
        ({"rule": "FORMS:later_one_by_one"}, r"reward\.rule=.* is async, .*give a function"),
        ({"rule": "FORMS:one_by_one"}, r"reward\.rule=.* yields, .*give a function"),
        ({"rule": "FORMS:bound"}, r"reward\.rule=.* yields, .*give a function"),
        ({"rule": "EXITS:rule"}, r"reward\.rule=.* ends the process that imports it"),
        ({"rule": "RAISES:rule"}, r"reward\.rule=.* cannot be imported: ZeroDivisionError"),
        ({"rule": "FILE:act", "workers": 0}, r"reward\.workers=0 must be 1 or more"),
        ({"rule": "FILE:act", "timeout_s": 0.0}, r"reward\.timeout_s=0.0 must be a positive number"),
        ({"rule": "FILE:act", "timeout_s": math.nan}, r"reward\.timeout_s=nan must be a positive number"),
    ],
)
def test_a_rule_that_cannot_run_is_refused_at_once(
    rule_file: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    (tmp_path / "exits.py").write_text("import os; os._exit(0)")
    (tmp_path / "raises.py").write_text("1 / 0")
    rule = settings["rule"].replace("FILE", str(rule_file))
    (tmp_path / "forms.py").write_text(FORMS)
    rule = rule.replace("FORMS", f"{tmp_path}/forms.py")
    rule = rule.replace("EXITS", f"{tmp_path}/exits.py").replace("RAISES", f"{tmp_path}/raises.py")
    start = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        RulePool(**{**settings, "rule": rule})
    assert time.monotonic() - start < CLOSING_S


def test_closing_twice_is_harmless_and_ends_the_workers(rule_file: Path) -> None:
    pool = RulePool(f"{rule_file}:act", workers=1)
    (score,) = pool.score(items("pid"))
    pool.close()
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(score.value), 0)


def run_program(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "job.py"
    path.write_text(program)
    env = {**os.environ, "PYTHONPATH": str(Path(rules.__file__).parents[2])}
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False, env=env)


def test_the_jobs_own_program_is_not_run_again_in_a_worker(rule_file: Path, tmp_path: Path) -> None:
    """No `if __name__ == "__main__"`, a heavy import, and leaving by the same door as the job."""
    program = f"""
import os, torch
from aligner.reward.pool import RulePool
print("started", flush=True)
pool = RulePool("{rule_file}:act", workers=2)
row = dict(prompt="p", response="heavy", fields={{}})
print("heavy modules", pool.score([row])[0].value, flush=True)
pool.close()
os._exit(3)
"""
    job = run_program(tmp_path, program)
    assert (job.returncode, job.stdout, job.stderr) == (3, "started\nheavy modules 0.0\n", "")


def test_workers_do_not_outlive_a_killed_job(rule_file: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal, threading, time
from aligner.reward.pool import RulePool
pool = RulePool("{rule_file}:act", workers=1, timeout_s=100)
row = lambda response: dict(prompt="p", response=response, fields={{}})
print(int(pool.score([row("pid")])[0].value), flush=True)
threading.Thread(target=pool.score, args=([row("loop")],), daemon=True).start()
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    job = run_program(tmp_path, program)
    assert job.returncode == -signal.SIGKILL
    worker = Path(f"/proc/{int(job.stdout)}")
    end = time.monotonic() + 10
    while worker.exists() and "\nState:\tZ" not in (worker / "status").read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert not worker.exists() or "\nState:\tZ" in (worker / "status").read_text()


def test_a_trivial_row_costs_less_than_half_a_millisecond(pool: RulePool) -> None:
    batch = items(*["value 1"] * 256)
    pool.score(batch)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        pool.score(batch)
        best = min(best, time.perf_counter() - start)
    assert best / len(batch) < 0.5e-3


def test_a_score_that_is_not_ok_is_no_number() -> None:
    assert [status.name for status in Status] == ["OK", "FAILED", "TIMEOUT", "UNPARSABLE"]
    assert Score(1.0, Status.OK, 0.0).detail == ""
