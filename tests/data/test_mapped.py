"""Columns that are null: not there, whatever they are stored in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligner.data.config import DataConfig
from aligner.data.mapped import MappedRows
from aligner.data.sets import read_sets
from aligner.data.sources.open import open_source
from tests.data.tokenizer_kinds import tokenizer_of

Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "jsonl": write_jsonl,
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_null_is_no_column(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "messages": None}, {"prompt": "c", "completion": "d", "messages": []}]
    WRITERS[kind](tmp_path / "rows", rows)
    source = MappedRows(open_source(tmp_path / "rows"), None, None, "demonstrations", None)
    assert source.row(0)[1] == {"prompt": "a", "completion": "b"}
    assert source.digest() == open_source(tmp_path / "rows").digest(), "which nothing was made of"


@pytest.mark.parametrize("kind", WRITERS)
def test_an_optional_column_may_be_null(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / "rows", [{"task": "t", "more": None, "out": "o"}, {"task": "t", "more": "m", "out": "o"}])
    columns = {"instruction": "task", "input": "more", "output": "out"}
    data = DataConfig(
        path=str(tmp_path / "rows"), kind="demonstrations", format="alpaca", columns=columns, prompts_per_step=1
    )
    first, second = read_sets(data, tokenizer_of("byte_level", "chatml")).training  # type: ignore[misc]
    assert first.fields["messages"][0]["content"] == "t" and second.fields["messages"][0]["content"] == "t\n\nm"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_needed_column_may_not_be_null(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / "rows", [{"q": "a", "out": None}, {"q": "a", "out": "b"}])
    data = DataConfig(path=str(tmp_path / "rows"), kind="demonstrations", columns={"prompt": "q", "completion": "out"})
    with pytest.raises(
        ValueError, match=r"rows(:|, row )1: 'out' is null \(data\.columns\.completion=out\); give each row a value"
    ):
        read_sets(data, tokenizer_of("byte_level", "chatml"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_field_of_a_prompt_may_be_null(kind: str, tmp_path: Path) -> None:
    """data.kind=prompts needs no label: it is a field for rewards."""
    WRITERS[kind](tmp_path / "rows", [{"q": "a", "verdict": None}, {"q": None, "verdict": 1}])
    source = MappedRows(open_source(tmp_path / "rows"), {"prompt": "q", "label": "verdict"}, None, "prompts", None)
    assert source.row(0)[1] == {"prompt": "a"}
    with pytest.raises(ValueError, match=r"'q' is null \(data\.columns\.prompt=q\)"):
        source.row(1)


def test_objects_of_tables_have_only_their_own_fields(tmp_path: Path) -> None:
    """A column of objects has the fields of all of them, null where an object does not have one: `datasets` writes them so."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "2"}}]
    for kind, write in WRITERS.items():
        write(tmp_path / kind, [{"prompt": "a", "calls": calls}])
        assert open_source(tmp_path / kind).row(0)[1]["calls"] == calls
