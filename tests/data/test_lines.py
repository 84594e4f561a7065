"""Answers on disk: cut at any byte they go on to the same file, and what does not fit together is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from aligner.data.lines import ResumableOutput, check_same_rows, chunks

SETTINGS: dict[str, Any] = {"--temperature": 0.5, "--system": None, "the model": "abc"}
TEXTS = ["plain", "zwölf 十二 \U0001f600", 'a "quote"\nand a line', "half a pair \ud83d", "\u2028", ""]


def line(index: int) -> dict[str, Any]:
    return {"index": index, "key": f"key{index}", "response": [TEXTS[index]]}


def indices(out: Path) -> list[int]:
    return [json.loads(text)["index"] for text in out.read_bytes().split(b"\n")[:-1]]


def finish(out: Path, part: int = 0) -> bool:
    """What is missing is appended, two rows at a time; whether the file became whole."""
    with ResumableOutput(out, SETTINGS, part) as lines:
        for chunk in chunks(len(TEXTS), 2):
            lines.append([line(index) for index in chunk if index not in lines.done])
        return lines.merge(len(TEXTS))


def test_a_cut_at_every_byte_ends_in_the_same_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "out.jsonl"
    whole.parent.mkdir()
    with ResumableOutput(whole, SETTINGS) as lines:
        lines.append([line(index) for index in range(len(TEXTS))])
    part = (whole.parent / "out.jsonl.part-0").read_bytes()
    assert finish(whole)
    assert sorted(path.name for path in whole.parent.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]
    assert whole.read_bytes() == part
    assert [json.loads(text) for text in part.split(b"\n")[:-1]] == [line(index) for index in range(len(TEXTS))]
    for length in range(len(part)):
        folder = tmp_path / f"cut{length}"
        folder.mkdir()
        shutil.copy(whole.with_name("out.jsonl.settings.json"), folder)
        (folder / "out.jsonl.part-0").write_bytes(part[:length])
        with ResumableOutput(folder / "out.jsonl", SETTINGS) as lines:
            assert list(lines.done) == list(range(part[:length].count(b"\n"))), "what was whole is kept, and only that"
            assert not lines.merge(len(TEXTS)) and not (folder / "out.jsonl").exists()
        assert finish(folder / "out.jsonl")
        assert (folder / "out.jsonl").read_bytes() == part, length


def test_parts_become_one_file_in_the_order_of_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "out[1].jsonl"  # a name that is a pattern too
    with ResumableOutput(out, SETTINGS, 0) as one, ResumableOutput(out, SETTINGS, 1) as other:
        one.append([line(4), line(1)])
        other.append([line(5), line(0)])
        assert not one.merge(6) and not out.exists()
        other.append([line(2), line(3)])
        assert one.merge(6)
        assert other.merge(6), "the other finds it done"
    assert indices(out) == [0, 1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out[1].jsonl", "out[1].jsonl.settings.json"]


def test_a_kill_between_the_merge_and_the_removal_of_parts(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert finish(out)
    before = out.read_bytes()
    (tmp_path / "out.jsonl.part-0").write_bytes(before)
    assert finish(out)
    assert out.read_bytes() == before and not (tmp_path / "out.jsonl.part-0").exists()


def test_rows_that_were_added_later(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ResumableOutput(out, SETTINGS) as lines:
        lines.append([line(0), line(1)])
        assert lines.merge(2)
    assert finish(out)
    assert indices(out) == list(range(6))


def test_another_writer_s_half_line_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ResumableOutput(out, SETTINGS, 1) as other:
        other.append([line(0)])
        os.write(other._file.fileno(), b'{"index": 1, "ke')
        with ResumableOutput(out, SETTINGS, 0) as one:
            assert set(one.done) == {0}
        os.write(other._file.fileno(), b'y": "key1"}\n')
        with ResumableOutput(out, SETTINGS, 0) as one:
            assert set(one.done) == {0, 1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {**SETTINGS, "--temperature": 1.0},
            r"--temperature is 1\.0 here, but 0\.5 in the run that started .*out\.jsonl",
        ),
        ({**SETTINGS, "--system": "Be kind."}, r'--system is "Be kind\." here, but not given in the run that started'),
        (
            {**SETTINGS, "the model": "abd"},
            r'the model is "abd" here, but "abc" in the run that started .*give another --output, or remove',
        ),
        ({"--temperature": 0.5, "--system": None}, r"the model is not given here"),
    ],
)
def test_other_settings_are_named(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    out = tmp_path / "out.jsonl"
    with ResumableOutput(out, SETTINGS) as lines:
        lines.append([line(0)])
    with pytest.raises(ValueError, match=said):
        ResumableOutput(out, settings)
    with ResumableOutput(out, SETTINGS) as lines:
        assert set(lines.done) == {0}, "nothing was lost"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="does not exist; create it first"):
        ResumableOutput(tmp_path / "none" / "out.jsonl", SETTINGS)
    out.write_text("{}\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists and has no out\.jsonl\.settings\.json beside it"):
        ResumableOutput(out, SETTINGS)
    out.unlink()
    with ResumableOutput(out, SETTINGS):
        with pytest.raises(ValueError, match=r"part-0 is being written by another process"):
            ResumableOutput(out, SETTINGS)
        ResumableOutput(out, SETTINGS, 1).__exit__()
    (tmp_path / "out.jsonl.part-0").write_text(json.dumps(line(0)) + "\nnot ours\n")
    with pytest.raises(ValueError, match=r"part-0:2 is not a line of this output"):
        ResumableOutput(out, SETTINGS)
    (tmp_path / "out.jsonl.settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not valid"):
        ResumableOutput(out, SETTINGS)


def test_other_rows_are_named() -> None:
    keys, out = ["a", "b", "c"], Path("out.jsonl")
    check_same_rows({0: "a", 2: "c"}, keys, str, out)
    with pytest.raises(ValueError, match=r"^row 1 is not the row that out\.jsonl was started with"):
        check_same_rows({0: "a", 1: "x"}, keys, lambda index: f"row {index}", out)
    with pytest.raises(ValueError, match=r"out\.jsonl has lines for 4 rows, but --input has 3"):
        check_same_rows({0: "a", 3: "d"}, keys, str, out)
