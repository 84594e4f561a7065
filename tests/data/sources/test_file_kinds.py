"""Files that hold no rows as they are: each is named, with what to do about it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from aligner.data.sources.open import open_source
from aligner.data.sources.source import all_rows

TEXT = b'{"prompt": "a"}\n' * 40


def zipped(content: bytes) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return memory.getvalue()


def tarred(content: bytes) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return memory.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, .*; run git lfs pull"),
        ("it's.zip", zipped(TEXT), "is a zip archive; run unzip '.*it'\"'\"'s.zip'"),
        ("rows.tar", tarred(TEXT), "is a tar archive; run tar -xf"),
        ("rows.txt", TEXT.decode().encode("utf-16"), "is UTF-16 text; run iconv -f UTF-16"),
        ("rows.parquet", b"<!DOCTYPE html><html>", "is an HTML page; download the file itself"),
        ("rows.pkl", pickle.dumps([{"prompt": "a"}]), "is a file of Python's pickle"),
        ("rows.db", b"SQLite format 3\x00", "is a database of SQLite"),
        ("rows.parquet", b"nothing of the kind", "is not a parquet file, as its name says"),
        ("rows.arrow", b"nothing of the kind", "is not an Arrow file, as its name says"),
        ("rows.parquet", b"PAR1\x15\x04" + b"\0" * 50, "is a damaged parquet file .*; fetch it again"),
        ("rows.arrow", b"ARROW1\0\0" + b"\1" * 50, "is a damaged Arrow file .*; fetch it again"),
        ("rows.arrow", b"\xff\xff\xff\xff\x10\0\0\0\1", "is a damaged Arrow file .*; fetch it again"),
        ("rows.jsonl.gz", gzip.compress(TEXT)[:-9], r"is compressed \(gzip\) and damaged or cut short .*; fetch it again"),
        ("rows.jsonl.bz2", bz2.compress(TEXT)[:-9], r"is compressed \(bzip2\) and damaged or cut short"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", r"is compressed \(zstd\) and damaged or cut short"),
        ("rows.parquet.gz", gzip.compress(b"PAR1"), r"is compressed, and holds another file \(parquet\)"),
        ("rows.jsonl.gz.gz", gzip.compress(gzip.compress(TEXT)), r"is compressed, and holds another file \(gzip\)"),
        ("rows.tar.gz", gzip.compress(tarred(TEXT)), "is a tar archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes hold the hour
)  # fmt: skip
def test_a_file_without_rows_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--input=.*{problem}"):
        open_source(tmp_path / name, "--input")


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows", "rows.txt"])
def test_lines_are_read_whatever_the_file_s_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXT)
    source = open_source(tmp_path / name)
    assert (len(source), source.row(39)) == (40, (f"{tmp_path / name}:40", {"prompt": "a"}))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"prompt": "a"}, 3]', "rows.json, row 2 is a JSON int, not an object"),
        ('[{"prompt": "a"},\n {"prompt": }]', r"rows.json:2 is not valid JSON: Expecting value at column 13"),
        ('{\n"prompt": ["a"], "answer": ["b"]}', r"rows.json holds columns \(prompt, answer\), not rows"),
        ('{\n"prompt": "a"\n}\n{"prompt": \n', "rows.json:5 is not valid JSON"),
        ("[]", "has no rows"),
        ('[{"prompt": "\\ud800"}]', r"rows.json, row 1 has .ud800 in 'prompt'"),
    ],
)
def test_a_wrong_document(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=problem):
        list(all_rows(open_source(tmp_path / "rows.json")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"prompt,answer\na,b\nc,d,e\n", "rows.csv:3 has 3 cells, and the header has 2 columns .prompt, answer."),
        (b"prompt,prompt\na,b\n", "rows.csv:1: the header has the column 'prompt' twice"),
        (b"prompt,\na,b\n", "rows.csv:1: the header has a column without a name"),
        (b'prompt\n"a\n', "rows.csv:2 is not valid CSV: unexpected end of data"),
        (b"prompt\na\n\xe9\n", "rows.csv:3 is not UTF-8 text"),
        (b"prompt\n", "has no rows"),
    ],
)
def test_a_wrong_table(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        list(all_rows(open_source(tmp_path / "rows.csv")))


def test_a_document_is_known_by_its_rows(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    for text in (json.dumps(row), json.dumps(row, indent=2)):
        (tmp_path / "rows.json").write_text(text)
        assert open_source(tmp_path / "rows.json").row(0)[1] == row


@pytest.mark.parametrize(
    ("name", "content"), [("r.csv", "prompt\na\nb,c\nd\n"), ("r.json", '[{"prompt": "a"}, 3, {"prompt": "d"}]')]
)
def test_rows_beside_a_wrong_one_can_be_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    source = open_source(tmp_path / name)
    assert (len(source), source.row(0)[1], source.row(2)[1]) == (3, {"prompt": "a"}, {"prompt": "d"})
    with pytest.raises(ValueError, match=name):
        source.row(1)
