"""Seconds of work on a device: the host's clock where it computes itself, CUDA events where it only launches kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class DeviceClock:
    """Marks on the current CUDA stream. A host's clock would measure how long launching took: neither kernels nor NCCL's
    `wait()` block the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """An event behind everything launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second one."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class PhaseClock:
    """Seconds by phase, of phases that are entered often; on CUDA they are known once the device has done the work."""

    def __init__(self, device: torch.device, phases: Sequence[str]) -> None:
        self._clock = DeviceClock(device) if device.type == "cuda" else None
        self._seconds = dict.fromkeys(phases, 0.0)
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Around some of the phase's work; of work that failed, nothing counts."""
        started = self._clock.mark() if self._clock else time.perf_counter()
        yield
        if self._clock:
            self._marks.append((phase, started, self._clock.mark()))
        else:
            self._seconds[phase] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Of each phase until now; on CUDA this waits for the device."""
        marks, self._marks = self._marks, []
        for phase, started, ended in marks:
            assert self._clock is not None
            self._seconds[phase] += self._clock.seconds(started, ended)
        return dict(self._seconds)
