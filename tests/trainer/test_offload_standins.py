"""The order of an offload on CUDA, on stand-ins for streams: copies after what computes, memory reused only after its copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from aligner.spmd.residency import Residency
from aligner.trainer.offload import Offloaded


class Stream:
    """A stream of the log of what is enqueued where."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, torch.device("cuda", 0)

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was enqueued, in order; tensors are the CPU's."""
    entries: list[str] = []
    current = [Stream("compute", entries)]
    copy, empty = Tensor.copy_, torch.empty

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def noted_copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        entries.append(f"copy on {current[-1].name}" + " and return" * non_blocking)
        return copy(self, source)

    def unpinned(*shape: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory:
            entries.append("pinned memory")
        return empty(*shape, **kwargs)

    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(Tensor, "copy_", noted_copy)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, stream: entries.append(f"memory is kept for {stream.name}")
    )
    monkeypatch.setattr(torch, "empty", unpinned)
    return entries


def test_the_order_of_copies(log: list[str]) -> None:
    values = torch.arange(6.0)
    part = Offloaded(lambda: [values], Stream("side", log))  # type: ignore[arg-type]
    part.evict()
    assert log == ["side waits for compute", "pinned memory", "copy on side and return", "memory is kept for side"]
    assert values.untyped_storage().nbytes() == 0
    log.clear()
    part.bring()
    assert log == ["side waits for compute", "copy on side and return"]
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    log.clear()
    part.evict()  # unchanged: the host's copy is good
    assert log == ["side waits for compute", "memory is kept for side"]
    part.bring()
    values.add_(1.0)
    part.changed()
    log.clear()
    part.evict()
    assert log == ["side waits for compute", "copy on side and return", "memory is kept for side"], "no new host memory"
    part.bring()
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_call_waits_for_what_comes_back(log: list[str]) -> None:
    residency = Residency(torch.device("cpu"))
    residency.stream = Stream("side", log)  # type: ignore[assignment]
    residency._come(frozenset())
    assert log == ["compute waits for side"]
