"""Programs that a rule has started end with its worker and with the job, however they try to stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aligner.reward import rules, supervisor
from aligner.reward.pool import RulePool, Status

RULES = """
import os, signal, subprocess, sys, time

def start(how, mark):
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(100)", mark]
    if how == "child": subprocess.Popen(sleep)
    if how == "session": subprocess.Popen(sleep, start_new_session=True)
    if how == "bare": subprocess.Popen(sleep, start_new_session=True, env={}, cwd="/")
    if how == "deaf": subprocess.Popen(["sh", "-c", "trap '' HUP INT TERM USR1 USR2; while :; do sleep 1; done", mark])
    if how == "shell": os.system(f"(setsid nohup {sys.executable} -S -c 'import time; time.sleep(100)' {mark} >/dev/null 2>&1 &) &")
    if how == "many":
        for _ in range(20): subprocess.Popen(sleep, start_new_session=True)
    if how == "daemon" and os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execv(sleep[0], sleep)
        os._exit(0)
    if how == "forking" and os.fork() == 0:  # a new process each 10 ms, which leaves its parent
        os.setsid()
        forker = "import os, sys, time\\nfor _ in range(3000):\\n    time.sleep(0.01)\\n    if os.fork(): os._exit(0)"
        os.execv(sys.executable, [sys.executable, "-S", "-c", forker, mark])
    time.sleep(0.5)

def act(prompt, response, how, mark):
    start(how, mark)
    if response == "wait": time.sleep(100)
    if response == "crash": os._exit(3)
    if response == "killed": os.kill(os.getpid(), signal.SIGKILL)
    return 1.0
"""
WAYS = ("child", "session", "bare", "deaf", "shell", "many", "daemon", "forking")
END_S = 20.0


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rules") / "starting.py"
    path.write_text(RULES)
    return f"{path}:act"


def running(mark: str) -> list[int]:
    """Processes with the mark in their command line; this one is not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return [pid for pid in found if pid != os.getpid()]


def gone(mark: str) -> bool:
    end = time.monotonic() + END_S
    while running(mark) and time.monotonic() < end:
        time.sleep(0.05)
    left = running(mark)
    for pid in left:  # not to be left on the machine by a test that fails
        os.kill(pid, signal.SIGKILL)
    return not left


def row(response: str, how: str, mark: str) -> dict[str, object]:
    return {"prompt": "p", "response": response, "fields": {"how": how, "mark": mark}}


def test_programs_end_with_the_time_limit_of_their_row(rule: str) -> None:
    marks = {how: f"limit-{how}-{os.getpid()}" for how in WAYS}
    with RulePool(rule, workers=2, timeout_s=1.5) as pool:
        scores = pool.score([row("wait", how, mark) for how, mark in marks.items()])
        assert {score.status for score in scores} == {Status.TIMEOUT}
        assert [how for how, mark in marks.items() if not gone(mark)] == []
        assert pool.score([row("go on", "none", "")])[0].value == 1.0


@pytest.mark.parametrize("how_it_ends", ["crash", "killed"])
def test_programs_end_with_their_worker(rule: str, how_it_ends: str) -> None:
    marks = {how: f"{how_it_ends}-{how}-{os.getpid()}" for how in ("session", "bare", "daemon")}
    with RulePool(rule, workers=2, timeout_s=30.0) as pool:
        scores = pool.score([row(how_it_ends, how, mark) for how, mark in marks.items()])
        said = {"crash": "the worker died: exit code 3", "killed": "the worker died: killed by SIGKILL"}[how_it_ends]
        assert [score.detail for score in scores] == [said] * 3
        assert [how for how, mark in marks.items() if not gone(mark)] == []


def test_a_server_that_a_rule_keeps_lives_as_long_as_its_worker(rule: str) -> None:
    mark = f"server-{os.getpid()}"
    with RulePool(rule, workers=1, timeout_s=30.0) as pool:
        assert pool.score([row("go on", "session", mark), row("go on", "none", "")])[0].value == 1.0
        assert running(mark)
    assert gone(mark)


JOB = """
import os, signal, sys, threading, time
from aligner.reward.pool import RulePool

pool = RulePool({rule!r}, workers=3, timeout_s=100)
rows = [dict(prompt="p", response=response, fields=dict(how=how, mark={mark!r})) for response, how in {rows!r}]
threading.Thread(target=pool.score, args=(rows,), daemon=True).start()
print("started", flush=True)
sys.stdin.readline()
if {leave!r} == "os._exit": os._exit(0)
if {leave!r} == "close": pool.close()
time.sleep(100 if {leave!r} == "stay" else 0)
"""


def by_signal(number: int, group: bool = False) -> Callable[[subprocess.Popen[str]], None]:
    return lambda job: (os.killpg if group else os.kill)(job.pid, number)


def by_itself(job: subprocess.Popen[str]) -> None:
    assert job.stdin
    job.stdin.write("\n")
    job.stdin.flush()


ENDS: dict[str, tuple[str, Callable[[subprocess.Popen[str]], None]]] = {
    "SIGKILL": ("stay", by_signal(signal.SIGKILL)),
    "SIGKILL to its group": ("stay", by_signal(signal.SIGKILL, group=True)),
    "SIGTERM": ("stay", by_signal(signal.SIGTERM)),
    "SIGTERM to its group": ("stay", by_signal(signal.SIGTERM, group=True)),
    "os._exit": ("os._exit", by_itself),
    "its last line": ("close", by_itself),
}


@pytest.mark.parametrize(("leave", "end"), ENDS.values(), ids=ENDS)
def test_programs_end_with_the_job(rule: str, leave: str, end: Callable[[subprocess.Popen[str]], None]) -> None:
    """Three workers, all still busy, and a daemon, a session and a program without environment below them."""
    mark = f"job-{os.getpid()}-{time.monotonic_ns()}"
    ways = [("wait", "daemon"), ("wait", "session"), ("wait", "bare")]
    program = JOB.format(rule=rule, mark=mark, rows=ways, leave=leave)
    env = {**os.environ, "PYTHONPATH": str(Path(rules.__file__).parents[2])}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    job: subprocess.Popen[str] = subprocess.Popen([sys.executable, "-c", program], env=env, **options)  # type: ignore[call-overload]
    assert job.stdin and job.stdout
    with job.stdin, job.stdout:
        assert job.stdout.readline() == "started\n"
        limit = time.monotonic() + 30
        while len(started := [pid for pid in running(mark) if pid != job.pid]) < len(ways) and time.monotonic() < limit:
            time.sleep(0.05)
        assert len(started) >= len(ways)
        end(job)
        job.wait(60)
    assert gone(mark)


def test_a_worker_has_the_signals_and_the_exit_code_of_one_without_a_supervisor(rule: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.py"
    path.write_text(
        "import os, signal\ndef ignored(prompt, response):\n"
        "    return sum(1 << n for n in (1, 3, 10, 12) if signal.getsignal(n) is signal.SIG_IGN)\n"
        "def code(prompt, response): os._exit(int(response))\n"
    )
    with RulePool(f"{path}:ignored", workers=1) as pool:
        assert pool.score([{"prompt": "", "response": ""}])[0].value == 0.0
    with RulePool(f"{path}:code", workers=1) as pool:
        details = [
            score.detail for score in pool.score([{"prompt": "", "response": code} for code in ("0", "7", "255")])
        ]
    assert details == [f"the worker died: exit code {code}" for code in (0, 7, 255)]


@pytest.mark.parametrize("without", ["", "del os.pidfd_open; "])
def test_a_supervisor_without_pidfds(without: str, tmp_path: Path) -> None:
    """It ends as its worker does, and takes along what the worker left."""
    mark = f"alone-{os.getpid()}"
    left = f"import os, sys\nif os.fork() == 0: os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(100)', '{mark}'])"
    worker = [sys.executable, "-S", "-c", f"{left}\nimport time; time.sleep(0.5); os._exit(7)"]
    program = (
        f"import os, runpy, sys; {without}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    told, tell = os.pipe()
    supervisor_command = [sys.executable, "-c", program, supervisor.__file__, str(tell), str(os.getpid()), *worker]
    process = subprocess.Popen(supervisor_command, pass_fds=[tell])
    os.close(tell)
    with open(told) as file:
        assert int(file.read()) not in (process.pid, 0)
    assert running(mark)
    assert process.wait(60) == 7
    assert running(mark) == []
