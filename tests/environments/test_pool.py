from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aligner.environments.pool import Action, Finished, Opened, PoolEvent, Stepped
from tests.environments.drive import ROGUES, contents, failure, play, pool

GOOD = ["say a", "say b", "say c", "end"]
GOOD_SAID = ["1: a", "2: b", "3: c"]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def wait_for_end(*pids: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_episodes_run_at_once_and_each_in_order() -> None:
    with pool(processes=2, episodes_per_process=3) as made:
        events = play(made, dict.fromkeys(range(9), GOOD))
        assert made.metrics()["calls"] == 9 * 6
        assert made.metrics() == {}
    for number, seen in events.items():
        assert contents(seen) == [f"task {number} seed {number}", *GOOD_SAID]
        assert [type(event) for event in seen] == [Opened, *4 * [Stepped], Finished]
        ended = seen[4]
        assert isinstance(ended, Stepped) and ended.turn.done and ended.turn.reward == 1.0
        assert ended.turn.metrics == {"steps": 4.0}
        assert seen[5] == Finished(number, None)


def test_a_slow_episode_holds_up_no_other_of_its_process() -> None:
    with pool(step_timeout_s=100.0) as made:
        made.open(0, {}, 0)
        made.open(1, {}, 1)
        opened: list = []
        while len(opened) < 2:
            opened += made.poll(60.0)
        made.step(0, Action("sleep 90"))
        made.step(1, Action("say quick"))
        assert [event.episode for event in made.poll(60.0)] == [1]


@pytest.mark.parametrize("shared", [2, 1], ids=["in one process", "alone"])
def test_paused_episodes_take_no_place(shared: int) -> None:
    """Twice as many as there are places: all are opened once those before them are paused, and each goes on where it was."""
    numbers = range(2 * shared)
    with pool(episodes_per_process=shared) as made:
        for number in numbers:
            made.open(number, {"q": number}, number)
        for half in (numbers[:shared], numbers[shared:]):
            opened: list[int] = []
            while len(opened) < shared:
                opened += [event.episode for event in made.poll(60.0)]
            assert sorted(opened) == list(half) and made.poll(0.2) == []
            for number in half:
                made.pause(number)
        assert len(made._slots) == 3 - shared
        left = set(numbers)
        for number in numbers:
            made.step(number, Action("say again"))
        while left:
            for event in made.poll(60.0):
                if isinstance(event, Stepped):
                    assert contents([event]) == ["1: again"]
                    made.finish(event.episode)
                else:
                    assert isinstance(event, Finished)
                    left.remove(event.episode)
        made.poll(0.2)
        assert len(made._slots) == 1, "the process beside is ended"


STUCK = {"sleep": "sleep 100", "keeps_the_global_lock": "regex"}


@pytest.mark.parametrize("stuck", STUCK.values(), ids=STUCK)
def test_a_stuck_step_fails_and_the_others_of_its_process_go_on(stuck: str) -> None:
    with pool(step_timeout_s=2.0) as made:
        events = play(made, {0: ["say a", stuck], 1: GOOD, 2: ["say a", "sleep 0.2", *GOOD]})
        metrics = made.metrics()
    failed = failure(events[0])
    assert failed.kind == "timeout" and "step (turn 2) exceeded environment.step_timeout_s=2" in failed.detail
    assert contents(events[1])[1:] == GOOD_SAID and isinstance(events[1][-1], Finished)
    assert contents(events[2])[1:] == ["1: a", "slept 0.2", "3: a", "4: b", "5: c"]
    assert metrics["failed_timeout"] == 1 and metrics["restarts"] == 1


def test_a_pause_of_the_rank_fails_no_call() -> None:
    """It trains for minutes, while answers that are more than the pipe holds wait for it. None of them is split by the pipe, so
    that at some time all that has arrived is whole, and others have not."""
    numbers = range(40)
    with pool(episodes_per_process=len(numbers)) as made:
        for number in numbers:
            made.open(number, {}, 0)
        opened: list = []
        while len(opened) < len(numbers):
            opened += made.poll(60.0)
        for number in numbers:
            made.step(number, Action("huge_later 3900"))
        (slot,) = made._slots.values()
        while len(slot.begun()) < len(numbers):
            assert made.poll(0.0) == []
        time.sleep(1.0)  # as if it had been 100 s: the answers are in the pipe, and wait for room there
        made._polled_at -= 100.0
        for episode in slot.begun():
            assert episode.running is not None and episode.running.begun_at is not None
            episode.running.begun_at -= 100.0
        stepped: list = []
        while len(stepped) < len(numbers):
            stepped += made.poll(60.0)
        assert {type(event) for event in stepped} == {Stepped}


CRASHES = {
    "exit_code": ("exit 3", "exit code 3"),
    "exit_0": ("exit 0", "exit code 0"),
    "segfault": ("segfault", "signal 11"),
    "sigkill_each_time": ("kill", "SIGKILL: perhaps the host ran out of memory"),
}


@pytest.mark.parametrize(("crash", "why"), CRASHES.values(), ids=CRASHES)
def test_a_crash_fails_its_episode_alone(crash: str, why: str) -> None:
    with pool() as made:
        events = play(made, {0: ["say a", crash], 1: ["sleep 1", *GOOD], 2: ["sleep 1", *GOOD]})
        metrics = made.metrics()
    failed = failure(events[0])
    assert failed.kind == "crashed" and why in failed.detail
    if crash.startswith("exit"):
        assert "my last words" in failed.detail  # from the process's log
    for number in (1, 2):
        assert contents(events[number])[1:] == ["slept 1", "2: a", "3: b", "4: c"]
    assert metrics["failed_crashed"] == 1


def test_a_worker_killed_from_outside_costs_no_episode(tmp_path: Path) -> None:
    with pool() as made:
        events = play(made, {0: ["say a", f"once {tmp_path / 'killed'}", "end"], 1: GOOD})
    assert contents(events[0])[1:] == ["1: a", "survived"] and isinstance(events[0][-1], Finished)
    assert contents(events[1])[1:] == GOOD_SAID


def test_a_crash_among_several_calls_is_found_out() -> None:
    """Nothing says which of three calls ended the process: each goes on in a process for itself, where one crashes again."""
    with pool(processes=2) as made:
        texts = {0: ["sleep 0.5", "exit 1"], 1: ["sleep 0.5", "sleep 3", "say a", "end"], 2: ["sleep 3", "end"]}
        events = play(
            made, {number: texts[number // 2] if number % 2 == 0 else ["say x", "end"] for number in range(6)}
        )
    assert failure(events[0]).kind == "crashed"
    assert contents(events[2])[1:] == ["slept 0.5", "slept 3", "3: a"] and contents(events[4])[1:] == ["slept 3"]
    assert all(contents(events[number])[1:] == ["1: x"] for number in (1, 3, 5))


def test_the_thread_that_crashed_is_found_among_many() -> None:
    """The traceback that names it is followed by those of other threads."""
    texts: dict[int, list[str]] = {number: ["sleep 2", "end"] for number in range(9)}
    with pool() as made:
        events = play(made, {**texts, 4: ["sleep 0.5", "segfault"]})
        metrics = made.metrics()
    assert failure(events[4]).kind == "crashed" and metrics["failed_crashed"] == metrics["restarts"] == 1


def test_a_process_that_closes_its_pipes_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    with pool(replay=False) as made:
        assert failure(play(made, {0: [f"closes {noted}"]})[0]).kind == "crashed"
        assert wait_for_end(*map(int, noted.read_text().split()))
        assert isinstance(play(made, {1: GOOD})[1][-1], Finished)


def test_an_idle_worker_killed_from_outside_is_replaced() -> None:
    with pool() as made:
        made.open(0, {}, 0)
        (_,) = made.poll(60.0)
        made.step(0, Action("pid"))
        (stepped,) = made.poll(60.0)
        os.kill(int(contents([stepped])[0]), signal.SIGKILL)
        made.step(0, Action("say x"))
        (failed,) = made.poll(60.0)  # a process id is never the same again
        assert failure([failed]).kind == "replay"
        assert play(made, {1: GOOD})[1][-1] == Finished(1, None)


def test_what_cannot_be_repeated_fails_when_its_process_is_lost() -> None:
    with pool(step_timeout_s=1.5) as made:
        events = play(made, {0: ["sleep 100"], 1: ["clock", *["sleep 0.2"] * 10, "end"]})
    assert failure(events[0]).kind == "timeout"
    assert failure(events[1]).kind == "replay"


def test_an_episode_among_many_bad_ones_goes_on() -> None:
    """It loses its process to three others, one after the other; then it has one for itself."""
    with pool(step_timeout_s=1.5) as made:
        stuck = {number: [f"sleep {number * 0.3}", "sleep 100"] for number in (1, 2, 3)}
        events = play(made, {0: ["sleep 0.2"] * 30 + ["end"], **stuck})
        metrics = made.metrics()
    assert isinstance(events[0][-1], Finished) and len(events[0]) == 33
    assert all(failure(events[number]).kind == "timeout" for number in stuck) and metrics["failed_timeout"] == 3


def test_an_answer_and_the_end_of_its_process_at_once() -> None:
    """As after a step of training between two polls: the failure stands in the answer's place, since the episode is closed."""
    with pool(replay=False) as made:
        made.open(0, {"q": 0}, seed=0)
        made.open(1, {"q": 1}, seed=1)
        opened: list[PoolEvent] = []
        while len(opened) < 2:
            opened += made.poll(1.0)
        made.step(0, Action("end"))
        time.sleep(0.5)
        made.step(1, Action("exit 3"))
        assert wait_for_end(*(process.pid for process in made._slots))
        events = made.poll(5.0)
    assert [(event.episode, type(event).__name__) for event in sorted(events, key=lambda event: event.episode)] == [
        (0, "Failed"), (1, "Failed"),
    ]  # fmt: skip


def test_without_replay_the_others_are_collateral() -> None:
    with pool(step_timeout_s=1.5, replay=False) as made:
        events = play(made, {0: ["sleep 100"], 1: [*["sleep 0.2"] * 10, "end"]})
    failed = failure(events[1])
    assert failed.kind == "collateral" and "timeout" in failed.detail


def test_memory_beyond_the_limit_fails_its_episode() -> None:
    with pool(memory_mib=512) as made:
        events = play(made, {0: ["say a", "eat"], 1: ["sleep 0.5", *GOOD]})
        metrics = made.metrics()
    failed = failure(events[0])
    assert failed.kind == "memory" and "environment.memory_mib" in failed.detail
    assert isinstance(events[1][-1], Finished)
    assert metrics["failed_memory"] == 1 and metrics["restarts"] == 1


WRONG = {
    "not_utf8_text": ("latin", "UTF-8"),
    "not_utf8_bytes": ("raw", "bytes that are not UTF-8"),
    "no_json": ("thing", "a object, which is neither text nor JSON"),
    "role": ("role", "role is 'wizard'"),
    "content": ("content", "content is a int, not text"),
    "nan": ("reward nan", "the reward is nan"),
    "reward_is_text": ("reward text", "the reward is 'much', not a number"),
    "done": ("done", "done is 'maybe'"),
    "fields": ("fields", "a turn has rewrad"),
}


@pytest.fixture(scope="module")
def wrong_events() -> dict[str, list]:
    with pool(episodes_per_process=len(WRONG)) as made:
        events = play(made, dict(enumerate([["say a", text] for text, _ in WRONG.values()])))
        metrics = made.metrics()
    assert metrics["failed_protocol"] == len(WRONG) and "restarts" not in metrics
    return {name: events[number] for number, name in enumerate(WRONG)}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_a_failure_of_the_protocol(case: str, wrong_events: dict[str, list]) -> None:
    failed = failure(wrong_events[case])
    assert failed.kind == "protocol" and WRONG[case][1] in failed.detail


@pytest.mark.parametrize("forged", ["text", "size", "utf"])
def test_what_is_no_message_costs_the_process(forged: str) -> None:
    with pool() as made:
        events = play(made, {0: [f"forge {forged}"]})
        assert failure(events[0]).kind == "protocol"
        assert isinstance(play(made, {1: GOOD})[1][-1], Finished)


def test_long_messages_are_cut_or_fail() -> None:
    with pool(max_output_chars=1000) as made:
        events = play(made, {0: ["huge 5000", "huge 300000000", "end"]})[0]
        cut = contents(events)[1]
        assert cut == "x" * 500 + "\n[... 4000 characters left out ...]\n" + "x" * 500
        assert isinstance(events[1], Stepped) and events[1].turn.metrics == {"cut_messages": 1.0}
        assert "[... 299999000 characters left out ...]" in contents(events)[2]
    with pool(max_output_chars=1000, long_output="fail") as made:
        failed = failure(play(made, {0: ["huge 5000"]})[0])
        assert (
            failed.kind == "protocol"
            and "5000 characters, more than environment.max_output_chars=1000" in failed.detail
        )
    with pool(max_output_chars=10**9) as made:
        failed = failure(play(made, {0: ["huge 20000000"]})[0])
        assert failed.kind == "protocol" and "bytes, more than" in failed.detail


def test_exceptions_are_told() -> None:
    with pool() as made:
        events = play(made, {0: ["raises"], 1: ["sysexit 2"], 2: GOOD}, {3: {}})
        assert failure(events[0]).kind == "error" and "KeyError at rogues.py" in failure(events[0]).detail
        assert failure(events[1]).kind == "error" and "SystemExit" in failure(events[1]).detail
        assert isinstance(events[2][-1], Finished)


@pytest.mark.parametrize(("act", "kind"), [("raises", "error"), ("exit 1", "crashed"), ("thing", "protocol")])
def test_a_reset_can_fail_too(act: str, kind: str) -> None:
    with pool() as made:
        events = play(made, {0: GOOD, 1: GOOD}, {0: {"reset": act}, 1: {"q": 1}})
    assert failure(events[0]).kind == kind
    assert contents(events[1])[1:] == GOOD_SAID


def test_the_time_of_an_episode_is_limited() -> None:
    with pool(step_timeout_s=10.0, episode_timeout_s=1.5) as made:
        events = play(made, {0: ["sleep 0.6"] * 5, 1: ["say a"] * 5})
    failed = failure(events[0])
    assert failed.kind == "episode_timeout" and "environment.episode_timeout_s=1.5" in failed.detail
    assert isinstance(events[1][-1], Finished)


def test_what_an_environment_prints_is_kept_from_the_protocol() -> None:
    with pool() as made:
        assert contents(play(made, {0: ["prints 500", "end"]})[0])[1:] == ["printed"]


def test_alone_in_a_process_global_random_numbers_come_from_the_seed() -> None:
    said = []
    for _ in range(2):
        with pool(episodes_per_process=1) as made:
            events = play(made, {7: ["chance", "chance", "end"], 8: ["chance", "end"]})
            said.append((contents(events[7]), contents(events[8])))
    assert said[0] == said[1] and said[0][0][1] != said[0][0][2] and said[0][0][1] != said[0][1][1]


def test_dropped_episodes_say_nothing_more_and_free_their_place() -> None:
    with pool(episodes_per_process=1) as made:
        made.open(0, {}, 0)
        made.open(1, {}, 1)
        assert [event.episode for event in made.poll(60.0)] == [0]
        made.step(0, Action("sleep 1"))
        made.drop(0)
        assert [event.episode for event in made.poll(60.0)] == [1]
        made.drop(1)
        made.drop(1)
        assert isinstance(play(made, {2: GOOD})[2][-1], Finished)


def test_a_process_for_an_episode_alone_that_was_dropped_is_ended() -> None:
    with pool() as made:
        made._start(extra=True)
        made.poll(0.0)
        assert [slot.extra for slot in made._slots.values()] == [False]


def test_a_rank_may_have_thousands_of_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"this machine allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1100:
            held.append(os.dup(held[0]))
        with pool() as made:
            assert isinstance(play(made, {0: GOOD})[0][-1], Finished)
    finally:
        for fd in held:
            os.close(fd)


def test_a_process_has_nothing_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
    for name in names:
        monkeypatch.setenv(name, "1")
    with pool() as made:
        asked = [f"env {name}" for name in ("CUDA_VISIBLE_DEVICES", *names)]
        events = play(made, {0: ["version", *asked, "end"]})
    assert contents(events[0])[1:] == [f"{sys.version.split()[0]} False False", "''", "None", "None", "None"]


def test_closing_the_pool_ends_all_that_was_started(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    with pool() as made:
        play(made, {0: [f"child {noted}", "end"]})
        pids = list(map(int, noted.read_text().split()))
        assert all(map(is_alive, pids))
    assert wait_for_end(*pids)


OWNER = """
import sys, time
from tests.environments.drive import pool, play
with pool() as made:
    play(made, {0: ["child " + sys.argv[1], "end"], 1: ["end"]})
    made.open(2, {}, 0)
    made.poll(60)
    from aligner.environments.pool import Action
    made.step(2, Action("regex"))
    print("ready", flush=True)
    time.sleep(100)
"""


def test_no_worker_outlives_its_rank(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(noted)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "ready\n"
    pids = list(map(int, noted.read_text().split()))
    assert all(map(is_alive, pids))
    owner.kill()
    owner.wait()
    assert wait_for_end(*pids)


BAD = {
    "file": ({"target": "/nowhere.py:X"}, "environment.target=/nowhere.py:X: /nowhere.py cannot be imported"),
    "module": (
        {"target": "no_such_module:X"},
        "environment.target=no_such_module:X: no_such_module cannot be imported",
    ),
    "name": ({"target": f"{ROGUES}:Rouge"}, "has no 'Rouge'; it has Rogue"),
    "python": ({"python": "/no/python"}, "environment.python=/no/python is not a program"),
    "options": (
        {"target": f"{Path(__file__).with_name('games.py')}:Guess", "options": {"hihg": 3}},
        "environment.options do not fit",
    ),
    "kind": ({"target": "TicTacToe-v0"}, "set environment.kind"),
    "import_exits": (
        {"target": f"{Path(__file__).with_name('exits.py')}:X"},
        "does not start: its process ended with exit code 3",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_told_before_the_first_episode(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match="environment") as error, pool(**settings):
        pass
    assert message in str(error.value)


def test_an_import_that_hangs_is_told(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time\nprint('reading my index')\ntime.sleep(100)\n")
    with (
        pytest.raises(ValueError, match=r"environment\.start_timeout_s=1; .*reading my index"),
        pool(target=f"{hangs}:X", start_timeout_s=1.0),
    ):
        pass
