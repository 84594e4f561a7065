"""The overhead benchmark runs, counts messages as one does by hand, and its fit finds known parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from aligner.health.timeline import Timeline
from tests import fork_server
from tools.bench.overhead import at, fit, job

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks(tmp_path: Path) -> None:
    """Split: rank 1 samples and scores, rank 0 trains.

    A step's messages from rank 1: the rows' lengths, the samples (header and body), the rewards, the end of the step.
    Rank 0, where what is logged is read, sends one: whether the job goes on.
    """
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tools/bench/overhead.py"), "--ranks", "2", "--batches", "rows"]
    command += ["--placements", "split", "--steps", "3", "--limit", "100", "--json", str(out)]
    done = fork_server.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (found,) = json.loads(out.read_text()).values()
    assert (found["2"]["messages"], found["2"]["messages_most"]) == (3.0, 5.0)
    # 16 rows of 656 tokens in the mean, some 17 bytes a token: int64 ids, a mask, float32 log-probabilities, int32 versions
    assert 100e3 < found["2"]["bytes_most"] < 16 * 1024 * 17 + 5 * 4096 + 32e3
    assert 0 < found["2"]["cpu_first"] <= found["2"]["cpu_most"] and found["2"]["wall"] > 0


@pytest.mark.parametrize("parts", [{"/n": 40.0, "": 5.0}, {"": 20.0, "n": 0.25}, {"log2 n": 3.0}])
def test_fit_finds_the_parts(parts: dict[str, float]) -> None:
    n = np.array([2, 4, 8, 16, 32, 64])
    value = {"/n": 1 / n, "": np.ones(6), "log2 n": np.log2(n), "n": n}
    found = fit(n.tolist(), sum(factor * value[name] for name, factor in parts.items()))
    assert {name: factor for name, factor in found.items() if factor > 1e-6} == pytest.approx(parts)
    assert at(found, 1024) == pytest.approx(
        sum(factor * {"/n": 1 / 1024, "": 1, "log2 n": 10, "n": 1024}[name] for name, factor in parts.items())
    )


def test_a_jobs_steps_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, steps of 10 s: an update of 6, values of 1, a function of 2 and a second between calls."""
    clock = [0.0]
    monkeypatch.setattr("aligner.health.timeline.time.perf_counter", lambda: clock[0])
    for rank in range(2):
        clock[0] = 0.0
        timeline = Timeline(rank)
        timeline.open(tmp_path, "rank", 9)
        for step in range(1, 5):
            timeline.at(step)
            for call, seconds, pause in (("transfer", 1, 1), ("policy.update", 6, 0), ("policy.map(f)", 2, 0)):
                with timeline.span("call", call):
                    clock[0] += seconds
                clock[0] += pause
        timeline.close()
    said = job(str(tmp_path))
    assert "2 steps of 10000 ms on 2 ranks" in said
    for line in ("engines 6000.00 ms 60.00%", "outside the engines 4000.00 ms 40.00%", "loop and driver 1000.00 ms"):
        assert line in " ".join(said.split()), said
