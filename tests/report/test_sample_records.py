"""Records of samples come back as they were written; a step without any is named with those that have some."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from aligner.report.sample_records import RecordedTurn, SampleRecord, read_records, records_path, write_records
from aligner.report.samples import sample_files, write_samples

RECORD = SampleRecord(
    row=0,
    prompt_index=7,
    fields={"prompt": "rendered", "messages": [{"role": "user", "content": "é"}], "answer": 3},
    tokens=[1, 2, 10, 4, 11, 1, 12],
    prompt_tokens=2,
    turns=[
        RecordedTurn(1, 2, 3, [-0.1], [4], 0.0),
        RecordedTurn(2, 4, 5, [-0.2000000123456], [5], 1.0),
        RecordedTurn(3, 6, 7, [-3e-9], [5], 0.5),
    ],
    segments=[0, 5],
    truncated=False,
    reward=1.5,
    status="ok",
    components={"rule": 1.5},
    episode_reward=1.5,
    episode={"ended": "done", "messages": [], "seed": 2**48 - 1},
)


def test_records_come_back_exactly(tmp_path: Path) -> None:
    other = replace(RECORD, row=1, episode=None, turns=[])
    path = write_records(tmp_path, 12, [RECORD, other])
    assert path == records_path(tmp_path, 12) and path.name == "step_000012.jsonl"
    assert list(read_records(tmp_path, 12)) == [RECORD, other]
    assert list(path.parent.iterdir()) == [path], "nothing half-written is left"


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    failed = replace(RECORD, reward=math.nan, episode_reward=math.nan, components={"rule": math.inf})
    path = write_records(tmp_path, 1, [failed])
    assert json.loads(path.read_text())["reward"] is None
    (read,) = read_records(tmp_path, 1)
    assert (read.reward, read.episode_reward, read.components) == (None, None, {"rule": None})


def test_a_missing_step_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no samples of step 3: it has none \(logging\.samples_every"):
        list(read_records(tmp_path, 3))
    for step in (1, 10):
        write_records(tmp_path, step, [RECORD])
    with pytest.raises(ValueError, match=r"no samples of step 3: it has those of steps 1, 10"):
        list(read_records(tmp_path, 3))


def test_readable_files_are_told_apart_from_records(tmp_path: Path) -> None:
    write_records(tmp_path, 1, [RECORD])
    assert [path.name for path in sample_files(write_samples(tmp_path, 1, []).parent.parent)] == ["step_000001.md"]


def test_a_task_is_the_row_of_the_data() -> None:
    assert RECORD.task == {"messages": RECORD.fields["messages"], "answer": 3}
    assert replace(RECORD, fields={"prompt": "p", "answer": 3}).task == {"prompt": "p", "answer": 3}


def test_segments_by_token() -> None:
    assert [RECORD.segment_of(index) for index in (0, 4, 5, 6)] == [0, 0, 5, 5]
