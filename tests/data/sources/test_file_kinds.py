"""Files of other forms: each is named, and the command in the message makes the rows of it that were meant."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from aligner.data.sources.open import open_source
from aligner.data.sources.source import all_rows

ROWS = [{"prompt": "a \"b\" 'c' $HOME\n", "answer": "1,5"}, {"prompt": "ü", "answer": "2"}]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(separator: str) -> bytes:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(ROWS[0]), *(separator.join(map(cell, row.values())) for row in ROWS)]
    return "".join(f"{line}\r\n" for line in lines).encode()


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
    ("name", "content", "what"),
    [
        ("it's rows.jsonl.gz", gzip.compress(TEXT), "compressed (gzip)"),
        ("rows.jsonl", gzip.compress(TEXT), "compressed (gzip)"),  # the beginning tells, whatever the name
        ("rows.xz", lzma.compress(TEXT), "compressed (xz)"),
        ("rows.json.bz2", bz2.compress(TEXT), "compressed (bzip2)"),
        ("rows.zip", zipped(TEXT), "a zip archive"),
        ("a $HOME rows.csv", table(","), "a table of comma-separated values"),
        ("rows.TSV", b"\xef\xbb\xbf" + table("\t"), "a table of tab-separated values"),
        ("it's rows.json", json.dumps(ROWS).encode(), "one JSON array"),
        ("rows.jsonl", b"\n " + json.dumps(ROWS, indent=2).encode(), "one JSON array"),
        ("rows.json", b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS), "JSON with objects that span"),
        ("rows.txt", TEXT.decode().encode("utf-16"), "UTF-16 text"),
    ],
)  # fmt: skip
def test_the_command_in_the_message_makes_the_rows(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^--input=") as error:
        list(all_rows(open_source(file, "--input")))
    said = str(error.value)
    assert said.startswith(f"--input={file} is {what}")
    command = said.partition("first run: ")[2].partition(" (with")[0]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-c", command], check=True, timeout=60, env={**os.environ, "PATH": path})
    (made,) = [one for one in tmp_path.iterdir() if one != file]
    assert made.suffix == ".jsonl"
    assert [row for _, row in all_rows(open_source(made))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "is compressed (zstd), .* first run: zstd -dc .*rows.jsonl.zst > .*rows.jsonl$"),
        ("rows.lz4", b"\x04\x22\x4d\x18\x04", "is compressed (lz4)"),
        ("train.parquet", b"PAR1\x15\x04", r"is a Parquet file, .* Dataset.from_parquet\('.*train.parquet'\).to_json\('.*train.jsonl'\)"),
        ("data.arrow", b"\xff\xff\xff\xff\x10\x00", r"is an Arrow stream, .* Dataset.from_file\('.*data.arrow'\)"),
        ("data.feather", b"ARROW1\x00\x00", r"is an Arrow file, .* pandas.read_feather"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, .* first run: git lfs pull"),
        ("rows.tar", tarred(TEXT), "is a tar archive"),
    ],
)  # fmt: skip
def test_what_only_other_programs_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said.replace("(", "[(]").replace(")", "[)]").replace("\\[", "[")):
        list(all_rows(open_source(tmp_path / name)))


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.parquet", "rows"])
def test_jsonl_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXT)
    assert [row for _, row in all_rows(open_source(tmp_path / name))] == ROWS


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("openai/gsm8k", "load_dataset[(]'openai/gsm8k', split='train'[)]"),
        ("hf://datasets/x", "URLs are not opened"),
        ("part-*.jsonl", "Only one file is read: join several with cat FILES"),
        ("a.jsonl,b.jsonl", "Only one file is read: join several with cat FILES"),
        ("rows/train.jsonl", "give a file with one JSON object a line.$"),
    ],
)
def test_what_a_missing_file_may_have_been_meant_as(
    path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        list(all_rows(open_source(path)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: (folder / "dataset_info.json").write_text("{}"), "load_from_disk"),
        (lambda folder: (folder / "train.jsonl").write_text("{}"), "It holds train.jsonl."),
        (lambda folder: None, "one JSON object a line.$"),
    ],
)
def test_a_folder_says_what_is_in_it(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=f"is a folder; .*{said}"):
        list(all_rows(open_source(tmp_path)))
