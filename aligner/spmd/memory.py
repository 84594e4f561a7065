"""Memory of this rank: the largest amount that each role call took, and errors that say who held what."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

GIB = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of glibc's mallopt."""
REMEDIES = (
    "What helps: residency.mode=auto, a smaller residency.budget_gib (or an emptier residency.keep), a smaller "
    "policy.micro_tokens, policy.recompute=full, a smaller rollout.kv_cache_mib or rollout.max_num_seqs, a placement with more ranks for a role "
    "(placement.policy.tensor, placement.policy.pipeline), or roles on ranks of their own (placement=split)."
)


class OutOfMemory(RuntimeError):
    """A role call did not find the memory it asked for."""


class Meter:
    """Largest memory in each role call: resident pages on a CPU, allocated bytes on CUDA.

    A boundary is the start of a call, once what it needs is there, or its end. The kernel's high-water mark is read and
    reset there; where it cannot be reset, a call that did not raise the process's mark counts what is resident at its
    two ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[float] = []
        self._calls: dict[str, float] = {}
        self._peak = 0.0
        self._mark = 0.0
        self.phantom = 0
        """Bytes that CUDA's allocator counts although they are unmapped: a sleeping engine's."""

    @contextmanager
    def measured(self, method: str, member: bool) -> Iterator[Callable[[], float]]:
        """Around a role call; it counts where this rank is a `member` of a role that takes part.

        Yields:
            What gives the call's largest memory in bytes, once it has ended.
        """
        self._boundary()
        self._open.append(0.0)
        largest = 0.0
        try:
            yield lambda: largest * GIB
        finally:
            self._boundary()
            largest = self._open.pop()
            if member:
                self._calls[method] = max(self._calls.get(method, 0.0), largest)

    def take(self) -> dict[str, float]:
        """GiB by role call since the last time, and under "peak" the largest of all, between calls too."""
        self._boundary()
        largest = {**self._calls, "peak": self._peak}
        self._calls, self._peak = {}, 0.0
        return largest

    def _boundary(self) -> None:
        reached = (self._of_cuda() if self._device.type == "cuda" else self._of_process()) / GIB
        self._peak = max(self._peak, reached)
        self._open = [max(largest, reached) for largest in self._open]

    def _of_cuda(self) -> float:
        reached = torch.cuda.max_memory_allocated(self._device) - self.phantom
        torch.cuda.reset_peak_memory_stats(self._device)
        return reached

    def _of_process(self) -> float:
        mark, now = resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark and nothing else
        except OSError:
            mark, self._mark = (mark if mark > self._mark else now), max(mark, self._mark)
        return mark


def resident() -> tuple[float, float]:
    """Bytes of this process in memory: the largest since the mark was reset, and now. (0, 0) without /proc."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0.0, 0.0
    sizes = [1024.0 * int(status.partition(name)[2].split(None, 1)[0]) for name in (b"VmHWM:", b"VmRSS:")]
    return sizes[0], sizes[1]


def available(device: torch.device, ranks_on_host: int) -> float:
    """Bytes that this rank can take in all: what is free on its device, or its share of what the host has available, with
    what the process holds already. A cgroup's limit counts where there is one."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = min(physical, _number(Path("/proc/meminfo"), "MemAvailable:") * 1024)
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    if math.isfinite(limit):
        stat = Path("/sys/fs/cgroup/memory.stat")
        free = min(free, limit - _number(Path("/sys/fs/cgroup/memory.current")) + _number(stat, "inactive_file"))
    return free / ranks_on_host + resident()[1]


def _number(file: Path, name: str = "") -> float:
    """The number after `name`, the first one of a line of text; infinite where there is none, such as "max"."""
    try:
        words = file.read_text().split()
        return float(words[words.index(name) + 1 if name else 0])
    except (OSError, ValueError, IndexError):
        return math.inf


def trim() -> None:
    """Give freed memory back to the system (glibc keeps blocks below its threshold)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def keep_freed(keep: bool) -> None:
    """Whether glibc keeps what is freed for what is allocated next. By itself it gives each block of more than 32 MiB back
    when it is freed, and the kernel zeroes its pages anew, one by one, for every activation of that size."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_MAX, 0 if keep else 65536)
    mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 << 20)
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # with 64 MiB above, what glibc's own thresholds come to


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by any of torch's and Python's names for it."""
    if isinstance(error, OutOfMemory):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def explain(error: BaseException, what: str, device: torch.device, held: Iterable[tuple[str, int, bool]]) -> str:
    """The error with who held what. `held`: (role.part, bytes, whether it is on the device now)."""
    here = [f"{name} {size / GIB:.2f} GiB" for name, size, resident in held if resident and size]
    out = [f"{name} {size / GIB:.2f} GiB" for name, size, resident in held if size and not resident]
    report = f"out of memory in {what} on {device}: {' '.join(str(error).split())}\n"
    report += f"  held here: {', '.join(here) or 'nothing by roles'}"
    if out:
        report += f"\n  moved out: {', '.join(out)}"
    if device.type == "cpu":
        report += f"\n  resident in this process: {resident()[1] / GIB:.2f} GiB"
    return f"{report}\n  {REMEDIES}"
