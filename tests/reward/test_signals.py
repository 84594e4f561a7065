"""Signals to every process of a job, as a scheduler sends them: rows keep their scores, programs of rules keep the defaults."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aligner.reward.pool import RulePool

ROOT = Path(__file__).resolve().parents[2]

RULES = """
import os, signal, subprocess, sys, time

SETTINGS = "import signal; print(sum(signal.getsignal(n) is signal.SIG_IGN for n in (1, 2, 10, 12, 15)), *signal.pthread_sigmask(0, ()))"

def act(prompt, response):
    if response == "program":  # killed by the signal, it says 0; a right answer's program must not
        return 1.0 if subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(0.5)"]).returncode == 0 else 0.0
    if response == "sleep":
        time.sleep(0.5)
        return 1.0
    if response == "settings":
        return float(subprocess.run([sys.executable, "-S", "-c", SETTINGS], capture_output=True, text=True).stdout)
    if response == "fork":  # as multiprocessing's terminate() does
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        return float(os.waitpid(child, 0)[1])
    if response == "itself":
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0.5
"""
OUTSIDE = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RulePool]:
    file = tmp_path_factory.mktemp("rules") / "rules.py"
    file.write_text(RULES)
    with RulePool(f"{file}:act", workers=2, timeout_s=10.0) as pool:
        yield pool


# In a process of its own, as a rank is: what other tests have started would die of the signals.
SCORING = """
import json, os, sys, threading, time
from pathlib import Path

from aligner.reward.pool import RulePool


def descendants():
    # every living process below this one, the oldest first, as a scheduler lists a job's
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found = [os.getpid()]
    for pid in found:
        found += sorted(child for child, parent in parents.items() if parent == pid)
    return found[1:]


found = {}
rows = [{"prompt": "", "response": response} for response in ("program", "sleep", "program", "sleep")]
with RulePool(f"{sys.argv[1]}:act", workers=2, timeout_s=10.0) as pool:
    pool.score(rows[1:2])
    for number in map(int, sys.argv[2:]):
        scores = []
        scoring = threading.Thread(target=lambda: scores.extend(pool.score(rows)))
        before = descendants()
        scoring.start()
        while len(descendants()) <= len(before):  # until a rule has started its program
            time.sleep(0.02)
        time.sleep(0.1)
        for pid in descendants():
            os.kill(pid, number)
        scoring.join(60)
        found[number] = {
            "scores": [(score.value, score.status.name) for score in scores],
            "ended": sorted(set(before) - set(descendants())),
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Signal -> the scores of four rows under way when it came, and which processes have ended."""
    folder = tmp_path_factory.mktemp("signalled")
    (folder / "rules.py").write_text(RULES)
    command = [sys.executable, "-c", SCORING, str(folder / "rules.py"), *(str(int(number)) for number in OUTSIDE)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resource_tracker" not in done.stderr and "KeyError" not in done.stderr, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("number", OUTSIDE, ids=lambda number: number.name)
def test_a_signal_to_every_process_changes_no_score(signalled: dict[str, Any], number: signal.Signals) -> None:
    found = signalled[str(int(number))]
    assert found["scores"] == [[1.0, "OK"]] * 4
    assert found["ended"] == [], "a worker, its supervisor or the resource tracker has ended"


def test_what_a_rule_starts_has_the_default_signals(pool: RulePool) -> None:
    nothing_ignored_or_blocked, died_of = pool.score(
        [{"prompt": "", "response": "settings"}, {"prompt": "", "response": "fork"}]
    )
    assert nothing_ignored_or_blocked.value == 0.0, nothing_ignored_or_blocked.detail
    assert died_of.value == float(signal.SIGTERM)


def test_a_rule_that_signals_itself_is_not_asked_for_ever(pool: RulePool) -> None:
    assert pool.score([{"prompt": "", "response": "itself"}])[0].value == 0.5
