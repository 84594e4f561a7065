"""The console: aligned, as wide as allowed, and plain text wherever there is no terminal."""

import io
import math
import os
import pty
import re
import struct
import termios
from fcntl import ioctl

import pytest

from aligner.report.console import HEADER_EVERY, Console, cell, columns_for, columns_that_fit, format_duration

END_OF_TEXT = "\x03"
ROLLOUT_ROW = {
    "reward": 0.5, "kl": 0.0123, "entropy": 1.25, "length": 20.4, "gap_max": 1.1e-5, "tokens_per_second": 12345.6,
    "seconds_generate": 0.31, "seconds_score": 0.004, "seconds_logprobs": 0.1, "seconds_update": 12.5,
    "seconds_reshard": 0.02, "loss": 0.01, "truncated": 0.0, "reshard_moved_bytes": 12,
    "reshard_gigabytes_per_second": 1.234,
}  # fmt: skip


def printed(*rows: tuple[int, dict[str, float]]) -> list[str]:
    stream = io.StringIO()
    console = Console(10, stream)
    for step, row in rows:
        console.row(step, row)
    console.close()
    return stream.getvalue().splitlines()


def through_a_terminal(columns: int, *rows: tuple[int, dict[str, float]]) -> str:
    """What a real (pseudo) terminal of this width receives. It delivers in pieces: the mark says that all has come."""
    main, worker = pty.openpty()
    ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(worker, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        console = Console(4, stream)
        for step, row in rows:
            console.row(step, row)
        console.close()
        stream.write(END_OF_TEXT)
        stream.flush()
        content = ""
        while not content.endswith(END_OF_TEXT):
            content += os.read(main, 65536).decode()
    os.close(main)
    return content.removesuffix(END_OF_TEXT)


def test_a_rollout_row_stands_under_its_titles_within_120_columns() -> None:
    _, titles, rule, row = printed((7, {**ROLLOUT_ROW, "accuracy": 0.984}))
    assert titles.split() == [
        "step", "reward", "accuracy", "kl", "entropy", "length", "gap", "tok/s",
        "generate", "score", "logprobs", "update", "reshard", "GB/s",
    ]  # fmt: skip
    assert row.split() == [
        "7", "0.500", "0.984", "0.0123", "1.250", "20.4", "1.1e-05", "12,346",
        "0.310", "0.004", "0.100", "12.5", "0.020", "1.23",
    ]  # fmt: skip
    assert len(titles) == len(rule) == len(row) <= 120
    ends = [match.end() for match in re.finditer(r"-+", rule)]
    assert [match.end() for match in re.finditer(r"\S+", row)] == ends
    assert [match.end() for match in re.finditer(r"\S+", titles)] == ends


def test_missing_is_a_dash_and_not_a_number_is_said() -> None:
    assert printed((1, {"reward": math.nan}))[-1].split()[:4] == ["1", "nan", "-", "-"]


def test_a_supervised_row_brings_its_own_columns() -> None:
    _, titles, _, row = printed((3, {"loss": 2.5, "tokens_per_second": 900.0, "grad_norm": 1.5, "lr": 2e-4}))
    assert titles.split() == ["step", "loss", "grad", "norm", "lr", "tok/s"]
    assert row.split() == ["3", "2.500", "1.500", "2.0e-04", "900"]


def test_an_evaluation_before_the_first_step_does_not_choose_a_supervised_table() -> None:
    lines = printed((0, {"accuracy": 0.25}), (1, {"loss": 1.0, "lr": 1e-3}))
    assert lines[1].split()[:2] == ["step", "reward"]
    assert lines[-3].split() == ["step", "loss", "accuracy", "lr"]
    assert lines[-1].split() == ["1", "1.000", "-", "1.0e-03"]


def test_training_of_another_kind_starts_another_table() -> None:
    lines = printed((1, {"loss": 1.0}), (1, ROLLOUT_ROW), (2, {"accuracy": 0.5}))
    assert [line.split()[1] for line in lines if "step" in line] == ["loss", "reward"]
    assert lines[-1].split()[:3] == ["2", "-", "0.500"]


def test_a_metric_of_a_users_own_loop_gets_a_column_where_there_is_room() -> None:
    assert [column.title for column in columns_for(["loss", "my_margin", "seconds_own"])] == [
        "step",
        "loss",
        "my_margin",
    ]


def test_the_header_is_repeated() -> None:
    lines = printed(*((step, ROLLOUT_ROW) for step in range(1, HEADER_EVERY + 2)))
    assert sum("reward" in line for line in lines) == 2


def test_a_failed_reward_is_not_silent() -> None:
    lines = printed((1, {**ROLLOUT_ROW, "reward_failed": 3, "reward_timeout": 0, "reward_unparsable": 2}))
    assert lines[-1].endswith("rewards left out of the advantages: 3 failed, 2 unparsable")


def test_no_control_characters_without_a_terminal() -> None:
    text = "\n".join(printed((1, ROLLOUT_ROW), (2, ROLLOUT_ROW)))
    assert text.isascii()
    assert not re.search(r"[^\n -~]", text)


def test_a_terminal_gets_a_bar_that_is_erased_before_the_next_row() -> None:
    content = through_a_terminal(120, (1, ROLLOUT_ROW), (2, ROLLOUT_ROW))
    bars = re.findall(r"\[(=*) *\] step (\d)/4 +(\d+)%", content)
    assert [(len(bar), step, share) for bar, step, share in bars] == [(7, "1", "25"), (14, "2", "50")]
    assert content.count("\r\x1b[K") == 2
    assert content.endswith("\n")


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_narrow_terminal_is_never_overrun_and_what_is_hidden_is_named(width: int) -> None:
    content = through_a_terminal(width, (1, ROLLOUT_ROW))
    table = [line for line in re.sub(r"\x1b\[K|\r", "", content).splitlines() if line and not line.startswith("(")]
    assert max(map(len, table)) <= width
    hidden = re.search(r"\(not shown at this width, but in metrics.jsonl: (.*?)\)", content)
    assert hidden
    assert "score" in hidden[1]


def test_step_and_outcome_are_kept_at_any_width() -> None:
    assert [column.title for column in columns_that_fit(columns_for(["reward"]), 10)] == ["step", "reward", "accuracy"]


def test_a_dumb_terminal_is_not_sent_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    Console(4, stream).row(1, ROLLOUT_ROW)
    assert "\x1b" not in stream.getvalue()


def test_a_closed_pipe_does_not_stop_the_training() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        console = Console(4, stream)
        for step in range(1, 4):
            console.row(step, ROLLOUT_ROW)
        console.close()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is left in the stream's buffer goes there when it is closed
        os.close(nowhere)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("reward", 0, "0.000"),
        ("reward", -0.5, "-0.500"),
        ("reward", 123.45, "123.5"),
        ("loss", 123456.0, "1.23e+05"),
        ("kl", 3.2e-5, "3.2e-05"),
        ("kl", math.inf, "inf"),
        ("kl", None, "-"),
        ("tokens_per_second", 1234567.0, "1.23e+06"),
        ("seconds_update", 1234.5, "1234"),
        ("step", 12, "12"),
    ],
)
def test_a_value_is_written_as_its_metric_is_read(metric: str, value: float | None, text: str) -> None:
    assert cell(metric, value) == text


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (754, "12:34"), (11045, "3:04:05"), (-1, "0:00")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_every_prints_some_rows_and_never_loses_an_evaluation() -> None:
    stream = io.StringIO()
    console = Console(total_steps=10, stream=stream, every=4)
    for step in range(1, 11):
        console.row(step, {"loss": 1.0 / step, **({"accuracy": 0.5, "seconds_evaluate": 0.1} if step == 7 else {})})
    console.close()
    shown = [int(line.split()[0]) for line in stream.getvalue().splitlines() if line.strip()[:1].isdigit()]
    assert shown == [1, 4, 7, 8, 10]
