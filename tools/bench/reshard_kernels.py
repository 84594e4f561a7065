"""What the proof of a weight transfer costs: pack with sums, landing and local copies, each beside the bare copy.

    python tools/bench/reshard_kernels.py [--mib 64] [--repeats 15] [--threads 1] [--device cpu]

Every block is one layout of `--mib` MiB of fp32 source: medians of the bare copies, and of the same with their proof.
On one CPU thread the seconds are those the thread computed, so that others on the machine are not counted. Last come
deltas (aligner/reshard/message/delta.py) for several changed fractions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # from a checkout that is not installed too

from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.message.chunked_copy import ChunkBuffers
from aligner.reshard.message.delta import apply, encode
from aligner.reshard.message.storage import strided_view
from aligner.reshard.plan.region import Piece
from aligner.reshard.plan.transfer_plan import Item
from aligner.reshard.transfer.local_copy import copy_local

WIDTH = 4096
SHARDS = {"contiguous rows": (1, WIDTH), "column slices": (4, WIDTH // 4)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mib", type=int, default=64, help="MiB of fp32 source")
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--device", default="cpu")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    print(
        f"torch {torch.__version__}, {_processor(chosen.device)}, {chosen.threads} thread(s), {chosen.mib} MiB of fp32"
    )
    for dtype in ("float32", "bfloat16"):
        for name, (shards, columns) in SHARDS.items():
            _Case(chosen.mib, dtype, shards, columns, torch.device(chosen.device)).report(name, chosen.repeats)
    report_deltas(chosen.mib // 2, 3, torch.device(chosen.device))


class _Case:
    """`shards` items, each `columns` wide, of one matrix into one of the same shape."""

    def __init__(self, mib: int, dtype: str, shards: int, columns: int, device: torch.device) -> None:
        rows = mib * (1 << 20) // 4 // WIDTH
        stride = (WIDTH, 1)
        self.items = [
            Item(
                "w",
                (0, low),
                (rows, columns),
                Piece("w", (0, low), (rows, columns), "from", low, stride, "float32"),
                Piece("w", (0, low), (rows, columns), "to", low, stride, dtype),
            )
            for low in range(0, shards * columns, columns)
        ]
        self.tensors = {
            "from": torch.randn(rows, WIDTH, device=device),
            "to": torch.zeros(rows, WIDTH, device=device, dtype=getattr(torch, dtype)),
        }
        self.dtype, self.device = dtype, device
        self.bucket = Bucket(self.items, Buffers(device))
        self.bytes = sum(item.bytes for item in self.items)

    def view(self, piece: Piece) -> Tensor:
        return strided_view(self.tensors[piece.storage], piece)

    def report(self, name: str, repeats: int) -> None:
        bucket, view = self.bucket, self.view
        steps: dict[str, Callable[[], None]] = {
            "pack": lambda: bucket.pack(view, False),
            "pack + sums": lambda: bucket.pack(view, True),
            "unpack": lambda: bucket.unpack(view, 0, 1, False),
            "unpack + proof": lambda: bucket.unpack(view, 0, 1, True),
            "local": lambda: copy_local(self.items, view, view, 0, False, ChunkBuffers()),
            "local + proof": lambda: copy_local(self.items, view, view, 0, True, ChunkBuffers()),
        }
        times: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(repeats + 2):  # interleaved, so that what else the machine does meets all alike
            for step, run in steps.items():
                times[step].append(self._seconds(run))
        seconds = {step: statistics.median(taken[2:]) for step, taken in times.items()}
        print(f"\nfp32 -> {self.dtype}, {name}, {self.bytes >> 20} MiB of message")
        for step, taken in seconds.items():
            print(f"  {step:14} {1e3 * taken:8.2f} ms  {self.bytes / taken / 1e9:6.1f} GB/s of message")
        print(
            f"  with proof, times the bare copy: pack {seconds['pack + sums'] / seconds['pack']:.2f}, "
            f"unpack {seconds['unpack + proof'] / seconds['unpack']:.2f}, "
            f"local {seconds['local + proof'] / seconds['local']:.2f}"
        )

    def _seconds(self, run: Callable[[], None]) -> float:
        return seconds_of(run, self.device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def report_deltas(mib: int, repeats: int, device: torch.device) -> None:
    before = torch.randint(-(2**15), 2**15 - 1, (mib << 19,), dtype=torch.int16, device=device)
    print(f"\ndeltas of {mib} MiB of bf16")
    for fraction in (0.001, 0.01, 0.05, 0.2, 0.6):
        now = torch.where(torch.rand(before.shape, device=device) < fraction, before ^ 1, before)
        delta = encode(now, before)
        assert delta is not None
        encoding = statistics.median(seconds_of(lambda now=now: encode(now, before), device) for _ in range(repeats))
        onto = before.clone()
        applying = statistics.median(
            seconds_of(lambda delta=delta, onto=onto: apply(delta, onto), device) for _ in range(repeats)
        )
        print(
            f"  {fraction:7.4f} changed: {delta.numel() / before.nbytes:.4f} of the bytes, encode "
            f"{before.nbytes / encoding / 1e9:.1f} GB/s, apply {before.nbytes / applying / 1e9:.1f} GB/s"
        )


def _processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
