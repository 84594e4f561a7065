"""Rows and the errors that say where a file is wrong."""

from pathlib import Path

import pytest

from aligner.data.sources.open import open_source
from aligner.data.sources.source import all_rows


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    return path


def test_rows_are_labelled_by_their_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "\xc3\xa9", "n": 2}')
    assert list(all_rows(open_source(path))) == [(f"{path}:1", {"prompt": "a"}), (f"{path}:4", {"prompt": "é", "n": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "is not valid JSON: Expecting ',' delimiter at column 15"),
        (b"{'prompt': 1}", "is not valid JSON"),
        (b'["a"]', "is a JSON list, not an object"),
        (b"3", "is a JSON int, not an object"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"n": ' + b"7" * 5000 + b"}", "has an integer of more than 4300 digits; write it as text"),
        (b'{"n": [-' + b"7" * 4301 + b"]}", "has an integer of more than 4300 digits; write it as text"),
        (b'{"prompt": "a \\ud83d b"}', r"has \ud83d in 'prompt': half of a surrogate pair"),
        (b'{"prompt": "\\uDE00\\uD83D"}', r"has \ude00 in 'prompt': half of a surrogate pair"),
        (b'{"m": [{"role": "user", "content": "\\udfff"}]}', r"has \udfff in 'm'[0]['content']: half"),
        (b'{"a": {"\\ud800": 1}}', r"has \ud800 in a key: half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, b'{"prompt": "a"}\n' * 16 + line + b"\n")
    source = open_source(path)
    for row in range(16):
        assert source.row(row)[1] == {"prompt": "a"}
    with pytest.raises(ValueError, match=r"prompts\.jsonl:17 ") as error:
        source.row(16)
    assert reason in str(error.value)


def test_whole_pairs_and_long_numbers_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"a": "\\ud83d\\ude00 \\\\ud83d", "n": ' + b"7" * 4300 + b"}")
    ((_, row),) = all_rows(open_source(path))
    assert row["a"] == "\N{GRINNING FACE} \\ud83d"
    assert row["n"] == int("7" * 4300)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"data\.heldout=.*prompts\.jsonl has no rows"):
        list(all_rows(open_source(write(tmp_path, content), setting="data.heldout")))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*absent\.jsonl does not exist"):
        list(all_rows(open_source(tmp_path / "absent.jsonl")))
    with pytest.raises(ValueError, match=r"data\.path=.* is a folder"):
        list(all_rows(open_source(tmp_path)))
