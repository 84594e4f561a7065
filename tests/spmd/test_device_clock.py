"""Seconds of the device's work, on stand-ins for CUDA events: launching takes the host no time, the work takes as it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aligner.health.timeline import DEVICE_LAUNCHES, HOST, Timeline, trace_file
from aligner.report.traces import events
from aligner.spmd.device_clock import DeviceClock, PhaseClock

GPU = torch.device("cuda", 0)


class Event:
    """A CUDA event, at the milliseconds that the stream had reached when it was recorded."""

    stream_ms = 0.0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.ms = Event.stream_ms

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: Event) -> float:
        return end.ms - self.ms


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.stream_ms, Event.waits = 0.0, 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)


def test_phases_are_the_devices() -> None:
    clock = PhaseClock(GPU, ("pack", "wire", "apply"))
    for phase, ms in (("pack", 2.0), ("wire", 30.0), ("pack", 3.0)):
        with clock(phase):
            Event.stream_ms += ms
    assert Event.waits == 0, "nothing waits for the device before the seconds are asked for"
    assert clock.seconds() == pytest.approx({"pack": 0.005, "wire": 0.03, "apply": 0.0})
    assert clock.seconds() == pytest.approx({"pack": 0.005, "wire": 0.03, "apply": 0.0})
    on_host = PhaseClock(torch.device("cpu"), ("pack",))
    with on_host("pack"):
        Event.stream_ms += 1e9
    assert 0 < on_host.seconds()["pack"] < 60


def test_spans_are_the_devices(tmp_path: Path) -> None:
    timeline = Timeline(0, marks=DeviceClock(GPU))
    timeline.open(tmp_path, "rank 0", 1)
    timeline.at(1)
    with timeline.span("call", "policy.update"):
        Event.stream_ms += 4000.0
        with timeline.span("wait", "weights", [1]):
            Event.stream_ms += 1500.0
    assert Event.waits == 0, "spans do not make the host wait"
    timeline.at(2)
    spans = [event for event in json.loads(trace_file(tmp_path, 0).read_text()) if event["ph"] == "X"]
    of_device = {event["name"]: (event["ts"], event["dur"]) for event in spans if event["tid"] == HOST}
    assert of_device == {"weights": (4.0e6, 1.5e6), "policy.update": (0.0, 5.5e6)}
    launched = {event["name"]: event["dur"] for event in spans if event["tid"] == DEVICE_LAUNCHES}
    assert launched.keys() == of_device.keys() and max(launched.values()) < 1e6
    assert len(list(events(tmp_path))) == 6  # four spans, the rank's name and its place


def test_a_devices_failure_is_not_hidden_by_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault every call of CUDA fails, an event's too."""
    timeline, clock = Timeline(0, marks=DeviceClock(GPU)), PhaseClock(GPU, ("pack",))
    timeline.open(tmp_path, "rank 0", 1)
    timeline.at(1)

    def broken(event: Event, stream: Any) -> None:
        raise RuntimeError("CUDA error: the event")

    def fail() -> None:
        with timeline.span("call", "policy.update"), clock("pack"):
            monkeypatch.setattr(Event, "record", broken)
            raise RuntimeError("CUDA error: the kernel")

    with pytest.raises(RuntimeError, match="the kernel"):
        fail()
    timeline.close()
    (span,) = [event for event in json.loads(trace_file(tmp_path, 0).read_text()) if event["ph"] == "X"]
    assert (span["name"], span["tid"]) == ("policy.update", DEVICE_LAUNCHES)
