"""Samples are readable, whatever a model wrote."""

from enum import IntEnum
from pathlib import Path

from aligner.report.samples import sample_files, write_samples


class Status(IntEnum):
    OK = 0
    TIMEOUT = 2


def test_one_prompt_is_shown_once_with_its_responses(tmp_path: Path) -> None:
    items = [
        {"prompt": "1+1=", "response": "#2", "reward": 1.0, "status": Status.OK, "fields": {"answer": "2"}},
        {"prompt": "1+1=", "response": "#3", "reward": float("nan"), "status": Status.TIMEOUT,
         "fields": {"answer": "2"}, "truncated": True},
        {"prompt": "2+2=", "response": "#4", "reward": 0.0, "fields": {}},
    ]  # fmt: skip
    path = write_samples(tmp_path, 12, items)
    assert path == tmp_path / "samples" / "step_000012.md"
    assert path.read_text() == (
        "# Samples of step 12\n\n"
        "## Prompt 1\n\n```text\n1+1=\n```\n\n"
        'Fields: {"answer": "2"}\n\n'
        "### Response 1: reward 1.000 (ok)\n\n```text\n#2\n```\n\n"
        "### Response 2: no reward (timeout)\n\n```text\n#3\n```\n\n- truncated: true\n\n"
        "## Prompt 2\n\n```text\n2+2=\n```\n\n"
        "### Response 1: reward 0.000\n\n```text\n#4\n```\n"
    )


def test_a_fence_is_longer_than_any_in_the_text_and_escapes_are_shown(tmp_path: Path) -> None:
    text = "````py\nx\n````\x1b[31m\x00\r\tß \ud800"
    content = write_samples(tmp_path, 1, [{"prompt": "p", "response": text, "reward": 1.0}]).read_text()
    assert "`````text\n````py\nx\n````\\x1b[31m\\x00\\r\tß \\ud800\n`````\n" in content


def test_files_are_in_the_order_of_their_steps_and_none_is_half_written(tmp_path: Path) -> None:
    for step in (1_000_000, 2, 30):
        write_samples(tmp_path, step, [])
    assert [path.stem for path in sample_files(tmp_path)] == ["step_000002", "step_000030", "step_1000000"]
    assert not list((tmp_path / "samples").glob("*.tmp"))
    assert "(none)" in sample_files(tmp_path)[0].read_text()
