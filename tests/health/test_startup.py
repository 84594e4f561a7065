"""A start's phases add up to its whole."""

from __future__ import annotations

import time

import pytest

from aligner.health.startup import Startup, process_age


def test_phases_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alive for 2 s; settings 1 s, nothing in particular 0.5, policy 3, settings 0.25 again, engine 0.01, then 1 s more."""
    clock = [100.0]
    monkeypatch.setattr("aligner.health.startup.time.monotonic", lambda: clock[0])
    startup = Startup(age=2.0)
    clock[0] += 1.0
    startup.mark("settings")
    clock[0] += 0.5
    with startup.phase("policy"):
        clock[0] += 3.0
    clock[0] += 0.25
    startup.mark("settings")
    with startup.phase("engine"):
        clock[0] += 0.01
    clock[0] += 1.0
    assert startup.phases == pytest.approx({"settings": 1.25, "other": 0.5, "policy": 3.0, "engine": 0.01})
    assert startup.text() == "ready after 7.8 s: settings 1.2, policy 3.0, other 3.5"


def test_the_age_of_this_process() -> None:
    first = process_age()
    time.sleep(0.05)
    assert first > 0.0 and process_age() >= first
