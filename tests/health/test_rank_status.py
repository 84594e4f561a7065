"""A rank that is killed, stopped, stuck or silent ends the job within a minute, with one report that names it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligner.bounds import check_settings
from aligner.health.activity import Activity
from aligner.health.config import HangConfig
from aligner.health.fault_report import is_lost_connection
from aligner.health.heartbeat import Heartbeats, beat_of
from aligner.health.journal import Journal
from aligner.health.local_processes import this_process
from aligner.health.process_identity import GONE, RUNNING, Process
from aligner.health.rank_status import current_status, ranks_text, report_text

PROMISE = 60
"""Seconds from the fault to the job's end."""
PROGRAM = """
import ctypes, os, signal, sys, time, torch
from aligner.data.samples import Samples
from aligner.health.config import HangConfig
from aligner.spmd.mesh import Mesh
from aligner.spmd.role import Role
from aligner.spmd.world import World

world = World(600, HangConfig(after_seconds=4, setup_seconds=4, dead_seconds=4), "run")
everyone = tuple(range(world.size))
policy, reward = Role("policy", world, Mesh(everyone)), Role("reward", world, Mesh(everyone))
world.activity.in_loop = True

def samples():
    one = torch.ones(4, dtype=torch.long)
    return Samples(torch.ones(4, 3, dtype=torch.long), one, one * 3, torch.ones(4, 3, dtype=torch.bool), one, [{}] * 4)

def update(x):
    return x.length_B

def score(x):
    if world.rank == WHO and world.journal.step == 2:
        print("FAULT", time.time(), flush=True)
        FAULT
    return x.length_B

try:
    for step in (1, 2, 3):
        world.journal.step = step
        ref = policy.scatter(samples())
        policy.map(update, ref).gather()
        time.sleep(1.2)
        reward.map(score, ref).gather()
except BaseException as error:
    world.fail(error)
world.leave()
"""
CASES = {
    "killed": (1, "os.kill(os.getpid(), signal.SIGKILL)", r"error: rank 1 died \(process \d+ on "),
    "first_killed": (0, "os.kill(os.getpid(), signal.SIGKILL)", r"error: rank 0 died \(process \d+ on "),
    "ended": (1, "os._exit(0)", r"error: rank 1 died \(process \d+ on "),
    "crashed": (1, "ctypes.string_at(0)", r"error: rank 1 died [^§]*Segmentation fault[^§]*in score"),
    "stopped": (1, "os.kill(os.getpid(), signal.SIGSTOP)", r"error: rank 1 is stopped .process \d+"),
    "first_stopped": (0, "os.kill(os.getpid(), signal.SIGSTOP)", r"error: rank 0 is stopped .process \d+"),
    "asleep": (
        1,
        "time.sleep(1000)",
        r"error: rank 1 has made no progress [^\n]*step 2, call 7: reward.map\(score\)[^§]*time.sleep\(1000\)",
    ),
    "lock_held": (
        1,
        "ctypes.PyDLL(None).sleep(1000)",
        r"error: rank 1 has been silent [^\n]*Python's lock[^§]*Timeout [^§]*in score",
    ),
    "memory": (1, "bytearray(1 << 60)", r"error on rank 1: OutOfMemory: out of memory in reward.map\(score\)"),
}  # fmt: skip


def _program(who: int, fault: str) -> str:
    return PROGRAM.replace("WHO", str(who)).replace("        FAULT", f"        {fault}")


WIDER = ("ended", "stopped", "lock_held", "first_stopped", "first_killed", "memory")
"""Run with -m matrix."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.matrix) if name in WIDER else name for name in CASES]
)
def test_the_faulty_rank_is_named(name: str, torchrun: Any, tmp_path: Path) -> None:
    who, fault, said = CASES[name]
    done = torchrun(3, _program(who, fault), seconds=100)
    ended = time.time()
    assert done.returncode != 0
    assert re.search(said, done.stderr), done.stderr[:6000]
    found = re.search(r"FAULT ([\d.]+)", done.stdout)
    assert found is not None
    assert ended - float(found[1]) < PROMISE
    files = list((tmp_path / "run" / "faults").glob("*.txt"))
    assert len(files) == 1, "one report"
    assert done.stderr.count("report: ") == 1
    text = files[0].read_text()
    assert re.search(said, text), text
    assert len(re.findall(r"^\d      *\S+ +\d+ +2 ", text, re.MULTILINE)) == 3, f"a line for each rank:\n{text}"
    assert "waits for values of rank" in text
    assert "rank 0" in text and "MainThread" in text


def test_what_a_bystander_sees_is_not_the_cause(torchrun: Any) -> None:
    """gloo's complaint about a closed connection is nobody's error."""
    done = torchrun(2, _program(1, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert "error on rank 0" not in done.stderr, done.stderr
    assert "rank 1 died" in done.stderr


def test_the_launcher_asks_the_job_to_end(torchrun: Any) -> None:
    """SIGTERM with every rank alive is no fault: nobody is called dead."""
    fault = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    done = torchrun(2, _program(1, fault), seconds=60)
    assert "exits because of SIGTERM" in done.stderr
    assert "died" not in done.stderr, done.stderr


def test_a_lost_launcher_is_told(torchrun: Any, tmp_path: Path) -> None:
    """The store goes with the launcher, and each rank is alone."""
    fault = "os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)"
    done = torchrun(2, _program(1, fault), seconds=60)
    assert re.search(r"error: rank 0 lost the job's store .its launcher, or the first host", done.stderr), done.stderr
    assert len(list((tmp_path / "run" / "faults").glob("*/*.txt"))) == 2


@pytest.mark.matrix
def test_a_frozen_store_is_told(torchrun: Any, tmp_path: Path) -> None:
    """The first host answers no more, and its connections stay open; here the launcher, which is let go on afterwards."""
    fault = "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(100)"
    fault = f"subprocess.Popen(['sh', '-c', f'sleep 30; touch continued; kill -CONT {{os.getppid()}}']); {fault}"
    done = torchrun(2, "import subprocess\n" + _program(1, fault), seconds=90)
    assert re.search(r"error: rank \d lost the job's store .*no answer for \d+ s", done.stderr), done.stderr[-4000:]
    reports = list((tmp_path / "run" / "faults").glob("*/*.txt"))
    assert len(reports) == 2
    assert all(one.stat().st_mtime < (tmp_path / "continued").stat().st_mtime for one in reports), "before it answered"


def test_a_restart_forgets_the_attempt_before(tmp_path: Path, torchrun: Any) -> None:
    """Under the c10d rendezvous, as --standalone is, all attempts share a store."""
    body = "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "job.py").write_text(_program(1, body))
    done = torchrun(2, ["--max-restarts", "1", str(tmp_path / "job.py")], seconds=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("rank 1 died") == 1
    assert done.stdout.count("FAULT") == 2


def beats(*rows: tuple[int, int, int, int, int]) -> list[bytes]:
    return [np.array(row, np.int64).tobytes() for row in rows]


CONFIG = HangConfig(after_seconds=10, setup_seconds=40, dead_seconds=5)


def looks(rows_at: Any, seconds: int, ranks: int = 3) -> tuple[int, Any] | None:
    """The second of the first verdict, and it. `rows_at(t)`: every rank's beat."""
    heartbeats = Heartbeats(range(ranks), CONFIG)
    for t in range(seconds):
        verdict = heartbeats.check(beats(*rows_at(t)), float(t))
        if verdict is not None:
            return t, verdict
    return None


def test_pulse_by_hand() -> None:
    # (heartbeats, progress, call, waits, in the loop)
    assert looks(lambda t: [(t, t, 7, 0, 1)] * 3, 100) is None
    silent = looks(lambda t: [(t, t, 7, 0, 1), (min(t, 3), 3, 7, 0, 1), (t, t, 7, 0, 1)], 100)
    assert silent == (9, {"kind": "silent", "ranks": [1], "seconds": 6.0})
    stuck = looks(lambda t: [(t, 4, 8, 1, 1), (t, 4, 7, 0, 1), (t, 4, 8, 1, 1)], 100)
    assert stuck == (11, {"kind": "hang", "ranks": [1], "seconds": 11.0})
    # the same before the first step has the longer limit
    setup = looks(lambda t: [(t, 4, 8, 1, 0), (t, 4, 7, 0, 0), (t, 4, 8, 1, 0)], 100)
    assert setup is not None and setup[0] == 41
    # a rank that waits for one that gets on, and one in the same role call as it, are well
    assert looks(lambda t: [(t, 4, 8, 1, 1), (t, t, 7, 0, 1), (t, 4, 7, 0, 1)], 100) is None
    # one that stands in a call of its own is not, whatever the others do
    alone = looks(lambda t: [(t, t, 8, 0, 1), (t, t, 9, 0, 1), (t, 4, 7, 0, 1)], 100)
    assert alone == (11, {"kind": "hang", "ranks": [2], "seconds": 11.0})
    # all wait for each other: those who are behind
    circle = looks(lambda t: [(t, 4, 8, 1, 1), (t, 4, 7, 1, 1), (t, 4, 8, 1, 1)], 100)
    assert circle is not None and circle[1]["ranks"] == [1]


def test_a_looker_that_slept_itself_blames_nobody() -> None:
    heartbeats = Heartbeats(range(2), CONFIG)
    same = beats((1, 1, 1, 0, 1), (1, 1, 1, 0, 1))
    assert heartbeats.check(same, 0.0) is None
    assert heartbeats.check(same, 1000.0) is None
    assert heartbeats.check(same, 1001.0) is None


def test_activity_by_hand() -> None:
    activity, journal = Activity(), Journal(0)
    journal.enter("reward.score")
    activity.enter("call", "reward.score")
    activity.enter("wait", "values", (1, 2, 3, 7))
    said = current_status(0, journal, activity)
    ((_, text, _),) = [report_text({"kind": "hang", "ranks": [0], "seconds": 5.0}, {0: said}, {}, 1)]
    assert "reward.score > waits for values of rank 1-3, 7" in text
    assert any("test_activity_by_hand" in call for call in said["stacks"]["MainThread"])
    before = np.frombuffer(beat_of(1, activity, journal), np.int64)
    activity.leave()
    after = np.frombuffer(beat_of(2, activity, journal), np.int64)
    assert (before[3], after[3]) == (1, 0)
    assert after[1] > before[1]
    activity.leave()
    with pytest.raises(AssertionError):
        activity.leave()


def test_an_error_s_place_is_kept_until_something_else_begins() -> None:
    activity = Activity()
    activity.enter("call", "policy.update")
    activity.enter("wait", "values", (3,))
    activity.record_exception()
    activity.leave()
    activity.record_exception()
    activity.leave()
    assert [one.what for one in activity.chain()][1:] == ["policy.update", "values"]
    activity.enter("call", "next")
    assert [one.what for one in activity.chain()][1:] == ["next"]


def test_equal_stacks_are_told_once() -> None:
    """1,024 ranks, one of them elsewhere: its stack comes first, and the others' once."""
    activity, journal = Activity(), Journal(0)
    said = {
        rank: {**current_status(rank, journal, activity), "stacks": {"MainThread": ["all.py:1"]}}
        for rank in range(1024)
    }
    said[77]["stacks"] = {"MainThread": ["odd.py:2"]}
    _, table, rest = report_text({"kind": "hang", "ranks": [77], "seconds": 5.0}, said, {}, 1024)
    assert len(table.splitlines()) == 1025
    assert rest == "rank 77, MainThread:\n    odd.py:2\n\nrank 0-76, 78-1023, MainThread:\n    all.py:1"


def test_processes_are_told_apart() -> None:
    me = this_process(0)
    assert me.state() == RUNNING
    assert Process(me.pid, me.started + 1).state() == GONE, "another process of the same number"
    assert Process(2**22 + 1, 5).state() == GONE


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234", True),
        ("[/x/gloo/transport/tcp/pair.cc:1] Read error [10.0.0.1]:1: Connection reset by peer", True),
        (
            "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
            True,
        ),
        (
            "[/x/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 1800000ms for recv operation to complete",
            False,
        ),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_errors_that_only_follow(text: str, lost: bool) -> None:
    assert is_lost_connection(RuntimeError(text)) is lost
    assert not is_lost_connection(ValueError(text))
    wrapped = KeyError("x")
    wrapped.__cause__ = RuntimeError(text)
    assert is_lost_connection(wrapped) is lost


def test_ranks_text_by_hand() -> None:
    assert ranks_text([7, 0, 1, 2]) == "0-2, 7"
    assert ranks_text([5]) == "5"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"after_seconds": 0.0}, "hang.after_seconds=0.0 must be finite and at least 2"),
        ({"dead_seconds": float("nan")}, "hang.dead_seconds=nan"),
        ({"setup_seconds": 200.0}, "hang.setup_seconds=200.0 must be at least hang.after_seconds=300.0"),
        (
            {"after_seconds": 60.0},
            "hang.after_seconds=60.0 would end the job while a row is scored, which may take 90 s",
        ),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, float], said: str) -> None:
    def check() -> None:
        config = HangConfig(**settings)
        check_settings(config, "hang")
        config.check_scoring(90.0)

    with pytest.raises(ValueError, match="hang") as error:
        check()
    assert said in str(error.value)
