"""Timelines: what is written is read, and who waited for whom, worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligner.health.timeline import Timeline, trace_file
from aligner.report.figures import LIGHT, png, styled
from aligner.report.gantt import gantt, idle_summary, lines
from aligner.report.traces import LOOP, TRANSFER, Segment, Span, cause_of, read_spans, segments_of, uses, whole_steps
from aligner.report.write import write_timeline


def call(rank: int, name: str, start: float, end: float, step: int = 1) -> Span:
    return Span(rank, "call", name, start, end, step)


def wait(rank: int, start: float, end: float, *ranks: int, step: int = 1) -> Span:
    return Span(rank, "wait", "values", start, end, step, ranks)


SPLIT = [
    # rank 0 trains for 4 s; rank 1 samples for 2 s before it; each waits for the other, the message takes half a second
    call(1, "rollout.generate", 0.0, 2.0),
    wait(0, 0.0, 2.5, 1),
    wait(1, 2.0, 2.5, 0),
    call(0, "policy.update", 2.5, 6.5),
    wait(1, 2.5, 7.0, 0),
    wait(0, 6.5, 7.0, 1),
]


def test_each_wait_has_the_cause_that_the_other_rank_is_busy_with() -> None:
    found = uses(SPLIT)
    assert found[0].calls == {"policy.update": pytest.approx(4.0)}
    assert found[0].waits == {"rollout.generate": pytest.approx(2.0), TRANSFER: pytest.approx(1.0)}
    assert found[1].waits == {"policy.update": pytest.approx(4.0), TRANSFER: pytest.approx(1.0)}
    assert (found[0].idle, found[1].idle) == pytest.approx((2.0, 4.0)), "a message on its way is not idleness"
    # idle: 6 of 2 x 7 seconds, 43%; 4 of 14 for the update, 2 of 14 for sampling; 2 of 14 in transfers
    assert idle_summary(found, 7.0) == (
        "7.00 s, ranks idle 43% (for policy.update 29%, rollout.generate 14%), in transfers 14%"
    )


def test_a_wait_inside_a_call_is_no_work() -> None:
    """The update of rank 0 waits in its middle for what rank 1 computes."""
    spans = [call(0, "policy.update", 0.0, 3.0), wait(0, 1.0, 2.0, 1), call(1, "reward.score", 0.0, 2.0)]
    found = uses(spans)
    assert found[0].calls == {"policy.update": pytest.approx(2.0)}
    assert found[0].waits == {"reward.score": pytest.approx(1.0)}
    assert found[1].calls == {"reward.score": pytest.approx(2.0), LOOP: pytest.approx(1.0)}


def test_a_cause_is_followed_through_ranks_that_wait_themselves() -> None:
    busy, idle = Segment(0, 1, "rollout.generate"), Segment(0, 1)

    def waits(*ranks: int) -> Segment:
        return Segment(0, 1, waits_for=ranks)

    assert cause_of(0, {0: waits(1), 1: waits(2), 2: busy}) == "rollout.generate"
    assert cause_of(0, {0: waits(1), 1: waits(0)}) == TRANSFER
    assert cause_of(0, {0: waits(1), 1: idle}) == LOOP
    assert cause_of(0, {0: waits(1, 2), 1: idle, 2: busy}) == "rollout.generate", "work explains more than a loop"
    assert cause_of(0, {0: waits(7)}) == TRANSFER, "a rank without a trace"


def test_segments_neither_overlap_nor_leave_gaps() -> None:
    spans = [call(0, "a", 1.0, 5.0), call(0, "b", 2.0, 3.0), wait(0, 2.5, 3.0, 1), call(0, "c", 6.0, 9.0)]
    assert segments_of(spans, 0.0, 8.0) == [
        Segment(0.0, 1.0), Segment(1.0, 2.0, "a"), Segment(2.0, 2.5, "b"), Segment(2.5, 3.0, "b", (1,)),
        Segment(3.0, 5.0, "a"), Segment(5.0, 6.0), Segment(6.0, 8.0, "c"),
    ]  # fmt: skip


def write(run_dir: Path, ranks: int, steps: int = 2) -> None:
    """The traces of a run of 3 steps, of which the first `steps` are wanted."""
    for rank in range(ranks):
        timeline = Timeline(rank)
        with timeline.span("call", "before the trace"):
            pass
        timeline.open(run_dir, f"rank {rank}: policy", steps)
        for step in (1, 2, 3):
            timeline.at(step)
            with timeline.span("call", "policy.update"), timeline.span("wait", "values", (1 - rank,)):
                pass
        timeline.close()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, ranks=2)
    spans = read_spans(tmp_path)
    of = [(span.rank, span.step, span.kind, span.name, span.ranks) for span in spans]
    assert of == [
        (rank, step, kind, name, ranks)
        for rank in (0, 1)
        for step in (1, 2)
        for kind, name, ranks in (("wait", "values", (1 - rank,)), ("call", "policy.update", ()))
    ]
    assert all(0 <= span.start <= span.end < 60 for span in spans)
    assert whole_steps(spans) == [1, 2]
    for rank in (0, 1):
        events = json.loads(trace_file(tmp_path, rank).read_text())  # strict, once it is closed
        assert events[0]["args"] == {"name": f"rank {rank}: policy"}
        assert {event["pid"] for event in events} == {rank}


def test_the_trace_of_a_killed_job_is_read_up_to_the_torn_line(tmp_path: Path) -> None:
    write(tmp_path, ranks=1)
    path = trace_file(tmp_path, 0)
    path.write_text(path.read_text()[: -len("]\n") - 30])
    assert len(read_spans(tmp_path)) == 4
    path.write_text("[\nnonsense\n" + path.read_text())
    with pytest.raises(ValueError, match=rf"{path}:2 is no trace event: 'nonsense'; remove it"):
        read_spans(tmp_path)


def test_the_picture_and_the_merged_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ranks=2)
    merged, picture = write_timeline(tmp_path, 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(merged.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 8
    said_lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said_lines[1:]] == ["rank 0", "rank 1"]
    with pytest.raises(ValueError, match="has no timeline of step 3; use one of 1, 2"):
        write_timeline(tmp_path, 3)
    with pytest.raises(ValueError, match=r"has no timelines; run with logging\.timeline_steps above 0"):
        write_timeline(tmp_path / "nowhere")


def test_the_picture_says_what_each_rank_did() -> None:
    with styled(LIGHT):
        figure = gantt(SPLIT, LIGHT, 7)
        assert png(figure).startswith(b"\x89PNG")
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0: idle 29%", "rank 1: idle 57%"]
    legend: Any = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["policy.update", "rollout.generate", "waits"]
    assert ax.get_title(loc="left").startswith("step 7: 7.00 s, ranks idle 43%")
    assert lines(SPLIT)[1] == "rank 0: policy.update 4.000; waits for rollout.generate 2.000, transfer 1.000"
