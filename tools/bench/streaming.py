"""Measure a streamed set: python tools/bench/streaming.py --rows 5000000 --work DIR [--kind parquet|arrow|jsonl].

Writes a set of chat rows once, then, each in a process of its own: the time from nothing to the first batch, and to the batch
at a position late in the set (a resume); the memory while rows are taken; and what steps wait for rows, where a step computes
for --step seconds. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of some 300 characters; texts are drawn from a pool, so that writing takes no longer than it must."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(10_000)]
    for number in range(count):
        question, answer = texts[number % 9_973], texts[number * 7 % 9_967]
        turns = [{"role": "user", "content": f"{number}: {question}"}, {"role": "assistant", "content": answer}]
        yield {"id": number, "messages": turns}


def write(path: Path, kind: str, count: int) -> None:
    """The set, as one file of `kind`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
        return
    source, schema = rows(count), pa.Table.from_pylist(list(rows(1))).schema
    with (
        pq.ParquetWriter(path, schema) if kind == "parquet" else pa.OSFile(str(path), "wb") as opened,
        opened if kind == "parquet" else pa.ipc.new_stream(opened, schema) as writer,
    ):
        while batch := [row for row, _ in zip(source, range(100_000), strict=False)]:
            writer.write_table(pa.Table.from_pylist(batch, schema))


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
    return {"seconds": time.perf_counter() - start, "digest_seconds": digested, "peak_mib": peak_mib()}


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


def waits(path: Path, model: str, step: float, steps: int) -> dict[str, Any]:
    """What steps of `step` seconds of matrix products wait for their rows."""
    import torch

    torch.set_num_threads(1)
    stream = stream_of(path, model)
    stream.take(BATCH)
    stream.metrics()
    matrix, found, lengths = torch.rand(600, 600), [], []
    for _ in range(steps):
        begin = time.perf_counter()
        while time.perf_counter() - begin < step:
            matrix = torch.tanh(matrix @ matrix)
        stream.take(BATCH)
        found.append(stream.metrics()["data/wait_seconds"])
        lengths.append(time.perf_counter() - begin)
    return {"median_ms": sorted(found)[steps // 2] * 1e3, "max_ms": max(found) * 1e3, "step_max": max(lengths)}


def peak_mib() -> float:
    """The process's resident memory at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a step's computation")
    options = parser.parse_args()
    path = options.work / f"rows_{options.rows}.{options.kind}"
    if not path.exists():
        write(path, options.kind, options.rows)
    found = {
        "file_mib": round(path.stat().st_size / 2**20),
        "first batch": apart(timed_start, path, options.model, 0),
        "resume at 80%": apart(timed_start, path, options.model, options.rows * 4 // 5),
        "memory": apart(memory_over, path, options.model, options.batches),
        "waits": apart(waits, path, options.model, options.step, 20),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
