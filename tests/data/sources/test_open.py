"""Data as people have it: every kind of file gives the same rows, each with its place, any of them at once."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from aligner.data.sources.open import open_source
from aligner.data.sources.source import RowSource, all_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": "a \"b\", 'c'\n$HOME", "answer": f"0{number}", "messages": [{"role": "user", "content": "ü\u2028"}]}
    for number in range(7)
]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def compress(kind: str, content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(ROWS[0])
        writer.writerows([row["prompt"], row["answer"], json.dumps(row["messages"])] for row in ROWS)


def arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=3)


def shards(folder: Path) -> None:
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"train-0000{number}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(TEXT),
    "lines named.json": lambda path: path.write_bytes(TEXT),
    "no_name": lambda path: path.write_bytes(b"\xef\xbb\xbf" + TEXT),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(TEXT)),
    "named_otherwise.jsonl": lambda path: path.write_bytes(gzip.compress(TEXT)),
    "rows.jsonl.zst": lambda path: path.write_bytes(compress("zstd", TEXT)),
    "rows.jsonl.lz4": lambda path: path.write_bytes(compress("lz4", TEXT)),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(TEXT)),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(TEXT)),
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "list over lines.json": lambda path: path.write_text("\n " + json.dumps(ROWS, indent=2)),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "under_data.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "objects over lines.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3),
    "no_suffix_parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "file.arrow": lambda path: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(path), chunksize=2),
    "stream.arrow": arrow_stream,
    "rows.csv": lambda path: table(path, ","),
    "rows.TSV": lambda path: table(path, "\t"),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path), num_shards=2),
    "saved_splits": lambda path: datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS)}
    ).save_to_disk(str(path)),
    "checkout": shards,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    source = open_source(tmp_path / name)
    assert [row for _, row in all_rows(source)] == ROWS
    labels = [label for label, _ in all_rows(source)]
    assert len(set(labels)) == len(ROWS) and all(label.startswith(str(tmp_path / name)) for label in labels)
    for index in (6, 0, 3, 3, 5, 1):
        assert source.row(index) == (labels[index], ROWS[index])
    if source.blocks() is not None:
        assert [row for block in source.blocks() or () for row in block] == list(range(7))
    assert source.digest() == open_source(tmp_path / name).digest()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "stream.arrow", "rows.csv", "saved", "rows.jsonl.gz"])
def test_the_digest_is_of_the_rows(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path / name)
    before = open_source(tmp_path / name).digest()
    (tmp_path / "elsewhere").mkdir()
    WRITERS[name](tmp_path / "elsewhere" / name)
    assert open_source(tmp_path / "elsewhere" / name).digest() == before
    monkeypatch.setitem(ROWS[5], "answer", "XX")
    monkeypatch.setattr("tests.data.sources.test_open.TEXT", TEXT.replace(b'"05"', b'"XX"'))
    (tmp_path / "other").mkdir()
    WRITERS[name](tmp_path / "other" / name)
    assert open_source(tmp_path / "other" / name).digest() != before


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    WRITERS["rows.jsonl"](first)
    WRITERS["rows.parquet"](second)
    source = open_source([str(first), str(second)])
    assert [row for _, row in all_rows(source)] == ROWS * 2
    assert source.row(6)[0] == f"{first}:7" and source.row(7)[0] == f"{second}, row 1"
    assert [(block.start, block.stop) for block in source.blocks() or ()] == [(0, 7), (7, 14)]
    by_glob = open_source(f"{tmp_path}/*.*")
    assert list(all_rows(by_glob)) == list(all_rows(source))
    assert by_glob.digest() == source.digest() != open_source([str(second), str(first)]).digest()


@pytest.mark.parametrize(
    ("split", "rows"), [("train", 7), ("test", 1)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["checkout", "saved_splits"])
def test_a_split_is_chosen(tmp_path: Path, name: str, split: str, rows: int) -> None:
    WRITERS[name](tmp_path / name)
    assert len(open_source(tmp_path / name, split=split)) == rows
    with pytest.raises(
        ValueError, match=rf"data\.path={tmp_path / name} has no .*validation; use data\.split=test or train"
    ):
        open_source(tmp_path / name, split="validation")


def test_splits_have_names_of_their_own(tmp_path: Path) -> None:
    for split in ("train_prefs", "train_sft", "test_sft"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / f"{split}-00000-of-00001.parquet")
    assert len(open_source(tmp_path, split="train_prefs")) == 7
    with pytest.raises(
        ValueError, match=r"has no files of the split train; use data\.split=test_sft or train_prefs or train_sft"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["main/train.jsonl", "socratic/train.jsonl"], r"holds 2 sets \(main, socratic\); give one of these folders"),
        (["train.jsonl", "train.json"], r"holds files of several kinds \(.json, .jsonl\).*give one kind: data.path='.*/\*.jsonl'"),
        (["README.md", ".hidden.jsonl"], "is a folder without data files"),
    ],
)  # fmt: skip
def test_a_folder_must_be_one_set(tmp_path: Path, names: list[str], problem: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(TEXT)
    with pytest.raises(ValueError, match=rf"^data\.path={tmp_path} {problem}"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("openai/gsm8k", r"stay offline; .* HF_HUB_OFFLINE=0, or download it first: hf download --repo-type dataset openai/gsm8k"),
        ("hf://datasets/x", "URLs are not opened; download the file first"),
        ("part-*.jsonl", r"matches no file; \. holds train.jsonl"),
        ("tain.jsonl", "does not exist; did you mean train.jsonl"),
        ("rows/other.jsonl", "does not exist; there is no folder rows"),
    ],
)  # fmt: skip
def test_a_missing_file(path: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(TEXT)
    with pytest.raises(ValueError, match=rf"^data\.path={path.replace('*', '[*]')}:? .*{problem}"):
        open_source(path)


def test_csv_cells_are_text_but_for_the_columns_that_are_not(tmp_path: Path) -> None:
    header = "prompt,completion,label,score,chosen"
    (tmp_path / "r.csv").write_text(
        f'{header}\n007,3.50,True,0.5,1\n"a\nb",x,false,-1,"[{{""role"": ""user"", ""content"": ""a""}}]"\n\n"[3, 1]",y,TRUE,,[1\n'
    )
    found = list(all_rows(open_source(tmp_path / "r.csv")))
    assert [row for _, row in found] == [
        {"prompt": "007", "completion": "3.50", "label": True, "score": 0.5, "chosen": "1"},
        {
            "prompt": "a\nb",
            "completion": "x",
            "label": False,
            "score": -1,
            "chosen": [{"role": "user", "content": "a"}],
        },
        {"prompt": "[3, 1]", "completion": "y", "label": True, "score": "", "chosen": "[1"},
    ]
    assert [label.rpartition(":")[2] for label, _ in found] == ["2", "3", "6"]


def test_empty_files_among_others_are_no_rows(tmp_path: Path) -> None:
    empty = pa.table({"prompt": pa.array([], pa.string())})
    WRITERS["rows.jsonl"](tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n")
    pq.write_table(empty, tmp_path / "c.parquet")
    assert [row for _, row in all_rows(open_source(f"{tmp_path}/*"))] == ROWS
    with pytest.raises(ValueError, match=r"b\.jsonl,.*c\.parquet\] has no rows: its 2 files are empty"):
        open_source([f"{tmp_path}/b.jsonl", f"{tmp_path}/c.parquet"])
    with pytest.raises(ValueError, match=r"b\.jsonl has no rows; give a file with one JSON object a line"):
        open_source(f"{tmp_path}/b.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_an_empty_file_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    WRITERS["rows.jsonl"](tmp_path / "a.jsonl")
    (tmp_path / f"b.{suffix}.gz").write_bytes(gzip.compress(b""))
    assert [row for _, row in all_rows(open_source(f"{tmp_path}/*"))] == ROWS
    with pytest.raises(ValueError, match=rf"b\.{suffix}\.gz has no rows"):
        open_source(tmp_path / f"b.{suffix}.gz")


def test_an_empty_split_beside_others(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([])}).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in all_rows(open_source(tmp_path / "saved"))] == ROWS
    with pytest.raises(ValueError, match=r"saved has no rows: .*saved\[test\]"):
        open_source(tmp_path / "saved", split="test")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_format_that_was_saved_does_not_count(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "a", "ids": [1, 2], "score": 0.5}]
    datasets.Dataset.from_list(rows).with_format(kind, columns=["ids"]).save_to_disk(str(tmp_path / "saved"))
    ((_, row),) = all_rows(open_source(tmp_path / "saved"))
    assert row == rows[0] and type(row["ids"]) is list


def test_numbered_files_of_a_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train2.jsonl", "train_03.jsonl", "test1.jsonl"):
        (tmp_path / name).write_bytes(TEXT)
    assert len(open_source(tmp_path)) == 21 and len(open_source(tmp_path, split="test")) == 7


@pytest.mark.parametrize("place", ["before", "between"])
def test_frames_of_compressed_files(tmp_path: Path, place: str) -> None:
    frames, skipped = [compress("zstd", TEXT)] * 2, b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    frames.insert(int(place == "between"), skipped)
    (tmp_path / "r.jsonl.zst").write_bytes(b"".join(frames))
    assert [row for _, row in all_rows(open_source(tmp_path / "r.jsonl.zst"))] == ROWS * 2


@pytest.mark.parametrize(
    ("group", "blocks"), [(40, [10] * 8 + [10, 5]), (4, [8] * 11 + [7]), (10, [10] * 9 + [5]), (95, [10] * 9 + [5])]
)
def test_row_groups_are_decoded_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, blocks: list[int]
) -> None:
    monkeypatch.setattr("aligner.data.sources.tables.BLOCK_ROWS", 10)
    monkeypatch.setattr("aligner.data.sources.tables.KEPT_BLOCKS", 2)
    pq.write_table(pa.table({"n": range(95)}), tmp_path / "r.parquet", row_group_size=group)
    source: RowSource = open_source(tmp_path / "r.parquet")
    assert [len(block) for block in source.blocks() or ()] == blocks
    for order in (range(95), range(94, -1, -1), [0, 94, 39, 40, 5, 12, 22, 3, 93, 1]):
        assert [source.row(index)[1]["n"] for index in order] == list(order)


def test_blocks_are_bounded_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner.data.sources.tables.BLOCK_BYTES", 20_000)
    texts = [f"{number}" + "x" * 1000 for number in range(95)]
    pq.write_table(pa.table({"n": texts}), tmp_path / "r.parquet", row_group_size=60, use_dictionary=False)
    source = open_source(tmp_path / "r.parquet")
    assert max(len(block) for block in source.blocks() or ()) <= 20
    assert [source.row(index)[1]["n"] for index in range(95)] == texts
