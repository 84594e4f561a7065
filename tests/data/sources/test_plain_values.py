"""Values of tables as JSON has them."""

from __future__ import annotations

import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligner.data.sources.open import open_source
from aligner.data.sources.plain_values import plain

TABLE = pa.table(
    {
        "prompt": pa.array(["a", None]).dictionary_encode(),
        "long": pa.array(["é", "2"], pa.large_string()),
        "map": pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string())),
        "lists": pa.array([["a"], []], pa.large_list(pa.string())),
        "level": pa.array([1, 2], pa.decimal128(5, 2)),
        "day": pa.array([date(2024, 5, 17), None]),
        "bytes": pa.array([b"\xc3\xa9", b"\xff"]),
    }
)
ROWS = [
    {"prompt": "a", "long": "é", "map": {"k": "v"}, "lists": ["a"], "level": 1, "day": "2024-05-17", "bytes": "é"},
    {"prompt": None, "long": "2", "map": {}, "lists": [], "level": 2, "day": None, "bytes": b"\xff"},
]


def test_each_type() -> None:
    given = [
        datetime(2024, 5, 17, 8),
        date(2024, 5, 17),
        time(8),
        timedelta(minutes=1),
        Decimal("0.50"),
        Decimal(3),
        b"a",
        b"\xff",
    ]
    assert plain(given) == ["2024-05-17T08:00:00", "2024-05-17", "08:00:00", 60.0, 0.5, 3, "a", b"\xff"]
    assert plain({"a": [{"b": None, "c": [None]}], "d": None}) == {"a": [{"c": [None]}]}
    assert json.dumps(plain(given[:-1]))


def test_columns_of_parquet_and_arrow(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "r.parquet")
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE)
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=1)
    for name in ("r.parquet", "f.arrow", "s.arrow"):
        source = open_source(tmp_path / name)
        assert [source.row(index)[1] for index in range(2)] == ROWS


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[("k", "v")], [("k", "v"), ("k", "w")]], pa.map_(pa.string(), pa.string())),
        pa.array([b"a", b"\xff"]).view(pa.string()),
    ],
    ids=["key twice", "not UTF-8"],
)
def test_a_value_that_cannot_be_read_is_an_error_of_its_row(column: pa.Array, tmp_path: Path) -> None:
    table = pa.table({"prompt": column})
    pq.write_table(table, tmp_path / "r.parquet")
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("r.parquet", "f.arrow"):
        source = open_source(tmp_path / name)
        assert source.row(0)[1]
        with pytest.raises(ValueError, match=rf"{name}, row 2 cannot be read \("):
            source.row(1)
