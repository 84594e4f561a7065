"""Measure a streamed set: python tools/bench/streaming.py --rows 5000000 --work DIR --model DIR [--kind parquet|arrow|jsonl].

Writes a set of chat rows once, then, each in a process of its own: the time from nothing to the first batch, and to the batch
at a position late in the set (a resume); the memory while rows are taken; and what steps of many small
operations wait for rows, and are slowed down. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "I",
    "at",
    "be",
    "this",
    "have",
    "from",
    "or",
    "one",
    "had",
    "by",
]
BATCH = 64


def tables(count: int) -> Iterator[Any]:
    """Arrow tables of conversations of some 300 characters, a million rows each. The texts are drawn from a pool."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    draw = random.Random(0)
    pool = pa.array([" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(10_000)])
    for start in range(0, count, 1_000_000):
        number = np.arange(start, min(count, start + 1_000_000))
        asked = pc.binary_join_element_wise(pc.cast(pa.array(number), pa.string()), pool.take(number % 9_973), ": ")
        texts = pa.concat_arrays([asked, pool.take(number * 7 % 9_967)])
        turn = np.stack([np.arange(len(number)), np.arange(len(number)) + len(number)], axis=1).ravel()
        roles = pa.array(["user", "assistant"]).take(np.arange(len(turn)) % 2)
        turns = pa.StructArray.from_arrays([roles, texts.take(turn)], ["role", "content"])
        messages = pa.ListArray.from_arrays(np.arange(0, len(turn) + 1, 2, dtype=np.int32), turns)
        yield pa.table({"id": number, "messages": messages})


def write(path: Path, kind: str, count: int) -> None:
    """The set, as one file of `kind`; of parquet with the row groups that pyarrow makes by default."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = next(tables(1)).schema
    if kind == "jsonl":
        with path.open("w") as file:
            for table in tables(count):
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    elif kind == "parquet":
        with pq.ParquetWriter(path, schema) as writer:
            for table in tables(count):
                writer.write_table(table)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for table in tables(count):
                stream.write_table(table, max_chunksize=1_000)


def stream_of(path: Path, model: str) -> Any:
    """The stream of the set, as a job makes it."""
    from aligner.data.config import DataConfig
    from aligner.data.sets import read_sets
    from aligner.data.streamed import ExampleStream
    from aligner.data.tokenizer import load_tokenizer

    data = DataConfig(path=str(path), kind="demonstrations", streaming=True, prompts_per_step=BATCH, max_tokens=4096)
    return ExampleStream(read_sets(data, load_tokenizer(model)).training, 0, True, BATCH)  # type: ignore[arg-type]


def timed_start(path: Path, model: str, position: int) -> dict[str, float]:
    """Seconds from the import of transformers to the first batch at `position`."""
    from transformers import AutoTokenizer  # noqa: F401

    start = time.perf_counter()
    stream = stream_of(path, model)
    digest_start = time.perf_counter()
    state = {**stream.state_dict(), "position": position}
    digested = time.perf_counter() - digest_start
    stream.load_state_dict(state)
    first = stream.take(BATCH)
    assert len(first) == BATCH
    return {"seconds": time.perf_counter() - start, "digest_seconds": digested, "mib": anonymous_mib()}


def memory_over(path: Path, model: str, batches: int) -> dict[str, Any]:
    """Resident memory while `batches` batches are taken, and rows a second."""
    stream = stream_of(path, model)
    stream.take(BATCH)
    start, seen = time.perf_counter(), []
    for batch in range(batches):
        stream.take(BATCH)
        if batch % max(1, batches // 10) == 0:
            seen.append(round(anonymous_mib()))
    return {"mib": seen, "rows_per_second": batches * BATCH / (time.perf_counter() - start)}


def waits(path: Path, model: str, operations: int, steps: int) -> dict[str, Any]:
    """What steps of `operations` small matrix products wait for their rows, and how long they take; and how long where no row
    is tokenized meanwhile."""
    import torch

    torch.set_num_threads(1)
    stream = stream_of(path, model)
    stream.take(BATCH)
    stream.metrics()
    matrix = torch.rand(256, 256) / 256

    def step() -> float:
        begin = time.perf_counter()
        value = matrix
        for _ in range(operations):
            value = torch.tanh(value @ matrix)
        return time.perf_counter() - begin

    waited, beside, alone = [], [], []
    for _ in range(steps):
        beside.append(step())
        stream.take(BATCH)
        waited.append(stream.metrics()["data/wait_seconds"])
        time.sleep(0.2)  # the thread has caught up
        alone.append(step())
    milliseconds = {"wait": waited, "step beside": beside, "step alone": alone}
    return {
        name: {"median_ms": median(values) * 1e3, "max_ms": max(values) * 1e3} for name, values in milliseconds.items()
    }


def anonymous_mib() -> float:
    """Resident memory that is the process's own, without pages of mapped files, which the system takes back at will."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--kind", choices=("parquet", "arrow", "jsonl"), default="parquet")
    parser.add_argument("--work", type=Path, required=True, help="folder for the set")
    parser.add_argument("--model", required=True, help="folder with a tokenizer that has a chat template")
    parser.add_argument("--batches", type=int, default=300, help="batches of 64 for the memory")
    parser.add_argument("--operations", type=int, default=1000, help="small matrix products of a step")
    options = parser.parse_args()
    path = options.work / f"rows_{options.rows}.{options.kind}"
    if not path.exists():
        write(path, options.kind, options.rows)
    found = {
        "file_mib": round(path.stat().st_size / 2**20),
        "first batch": apart(timed_start, path, options.model, 0),
        "resume at 80%": apart(timed_start, path, options.model, options.rows * 4 // 5),
        "memory": apart(memory_over, path, options.model, options.batches),
        "waits": apart(waits, path, options.model, options.operations, 30),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
