"""Signals to every process of a job, as a scheduler sends them: rows keep their scores, programs of rules keep the defaults."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligner.reward.pool import RulePool, Score, Status

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


def descendants() -> list[int]:
    """Every process below this one, the oldest first, as a scheduler lists a job's."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    found = [os.getpid()]
    for pid in found:
        found += sorted(child for child, parent in parents.items() if parent == pid)
    return found[1:]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("number", OUTSIDE, ids=lambda number: number.name)
def test_a_signal_to_every_process_changes_no_score(pool: RulePool, number: signal.Signals) -> None:
    found: list[Score] = []
    rows = [{"prompt": "", "response": response} for response in ("program", "sleep", "program", "sleep")]
    scoring = threading.Thread(target=lambda: found.extend(pool.score(rows)))
    before = descendants()
    scoring.start()
    while len(descendants()) <= len(before):  # until a rule has started its program
        time.sleep(0.02)
    time.sleep(0.1)
    for pid in descendants():
        os.kill(pid, number)
    scoring.join(60)
    assert [(score.value, score.status) for score in found] == [(1.0, Status.OK)] * 4
    assert set(before) <= set(descendants()), "a worker or the resource tracker has ended"


def test_what_a_rule_starts_has_the_default_signals(pool: RulePool) -> None:
    nothing_ignored_or_blocked, died_of = pool.score(
        [{"prompt": "", "response": "settings"}, {"prompt": "", "response": "fork"}]
    )
    assert nothing_ignored_or_blocked.value == 0.0, nothing_ignored_or_blocked.detail
    assert died_of.value == float(signal.SIGTERM)


def test_a_rule_that_signals_itself_is_not_asked_for_ever(pool: RulePool) -> None:
    assert pool.score([{"prompt": "", "response": "itself"}])[0].value == 0.5
