"""The report stands alone, says the right numbers, and shows nothing as markup that a model wrote."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aligner.report.metrics import MetricsWriter
from aligner.report.samples import write_samples
from aligner.report.statistics import facts, phase_seconds, run_summary
from aligner.report.write import compare_report, write_report

PNG = b"\x89PNG\r\n\x1a\n"
TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"


def make_run(folder: Path, lift: float = 0.5, rows: int = 4) -> Path:
    """A run whose figures are worked by hand: held-out accuracy 0.25 -> 0.25 + lift, 10 s a step."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "time": 1000.0, "accuracy": 0.25}]
    for step in range(1, rows + 1):
        lines.append(
            {
                "step": step, "time": 1000.0 + 10 * step, "reward": 0.1 * step, "kl": None if step == 2 else 0.01,
                "entropy": 1.0, "length": 20.0, "gap_max": 1e-5, "tokens_per_second": 100.0 * step, "seconds": 10.0,
                "seconds_generate": 4.0, "seconds_update": 3.0, "seconds_reshard": 0.5, "reward_timeout": 1,
                "reward_failed": 0, "reshard_moved_bytes": 2e6, "reshard_minimum_bytes": 1e6, "reshard_gigabytes_per_second": 0.004,
                "seconds_reshard_pack": 0.1 * step, "seconds_reshard_wire": 0.2, "reshard_changed_bytes": 25e4,
            }
        )  # fmt: skip
    lines[-1]["accuracy"] = 0.25 + lift
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(HTMLParser):
    """Tags, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("img", "meta", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_summary_says_the_figures_worked_by_hand(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # 4 steps of 10 s after the first time stamp; median of 100, 200, 300, 400.
    assert run_summary(rows) == "held-out accuracy 0.250 \u2192 0.750 (+50.0 points), 4 steps in 0:40, 250 tokens/s"


def test_the_page_is_self_contained_well_formed_and_has_every_section(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("model: <b>bold</b>\n")
    (run / "environment.json").write_text('{"torch": "9.9", "gpus": ["H<1>"], "git_revision": null}')
    png, html = write_report(run)
    assert png.read_bytes().startswith(PNG)
    text = html.read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not re.search(r"https?://|@import|url\(", text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Learning curve", "How it went", "Seconds by phase", "Resharding", "Last 5 rows", "Environment",
    ]  # fmt: skip
    assert "prefers-color-scheme:dark" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "H&lt;1&gt;" in text
    assert "<b>" not in text
    assert "4 timeout" in text
    # 4 syncs of 2 MB where 1 MB would do, in 0.5 s each.
    assert "moved 8 MB, 2.000 times the minimum of 4 MB; median 500.0 ms a sync; median 0.00 GB/s" in text
    assert "25.00% of the needed bytes had changed" in text
    assert "<td>pack: read, cast, checksum</td><td>1.000</td><td>250.0</td>" in text
    assert "<td>wire: wait for messages</td><td>0.800</td><td>200.0</td>" in text


def test_samples_of_the_first_and_last_step_are_shown_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step in (1, 2, 3):
        write_samples(run, step, [{"prompt": f"p{step}", "response": "</pre><script>alert(1)</script>", "reward": 1.0}])
    text = write_report(run)[1].read_text()
    assert "p1" in text
    assert "p3" in text
    assert "samples of step 2" not in text.lower()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_name_with_markup_is_escaped(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "<img src=x>&"))[1].read_text()
    assert "<h1>&lt;img src=x&gt;&amp;</h1>" in text


def test_phases_and_the_rest_add_up_to_the_step() -> None:
    rows = [
        {"step": 0, "accuracy": 0.5},
        {"step": 1, "seconds": 10.0, "seconds_generate": 4.0, "seconds_update": 3.0, "seconds_evaluate": 50.0},
        {"step": 2, "seconds": 10.0, "seconds_generate": 9.0, "seconds_update": 8.0},  # overlapped, on disjoint ranks
    ]
    assert phase_seconds(rows) == {
        "generate": [4.0, 9.0], "update": [3.0, 8.0], "evaluate": [50.0, 0.0], "other": [3.0, 0.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": None}],
        [{"step": 0, "accuracy": 0.5}],
        [{"step": 1, "reward": None, "gap_max": 0.0, "seconds": 1.0, "seconds_update": 0.5}],
        [{"step": 1, "own": 1.0}],
        [{"step": 1, "reward": 1.0, "reshard_moved_bytes": 0, "reshard_minimum_bytes": 0, "seconds_reshard": 0.1}],
    ],
    ids=["one row", "NaN loss", "evaluation only", "no reward, no gap", "own metric", "nothing moved"],
)
def test_a_run_of_any_shape_gets_a_report(tmp_path: Path, rows: list[dict[str, float | None]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    png, html = write_report(tmp_path)
    assert png.read_bytes().startswith(PNG)
    assert Page(html.read_text()).open == []


def test_a_sync_that_moved_nothing_is_said_to(tmp_path: Path) -> None:
    row = {"step": 1, "reward": 1.0, "reshard_moved_bytes": 0, "reshard_minimum_bytes": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "every region was already where it was needed" in write_report(tmp_path)[1].read_text()


def test_the_report_of_what_the_writer_wrote(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, console=False) as writer:
        for step in range(1, 31):
            writer.log(step, {"loss": 1.0 / step, "lr": 1e-3, "grad_norm": float("nan") if step == 9 else 1.0})
    text = write_report(tmp_path)[1].read_text()
    assert "Seconds by phase" not in text
    assert "Resharding" not in text
    assert "<td>python</td>" in text


def test_several_runs_make_one_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", lift) for name, lift in (("a", 0.4), ("b", 0.5), ("c", 0.6))]
    out = compare_report(runs, tmp_path / "new" / "compare.png")
    assert out.read_bytes().startswith(PNG)


def test_runs_that_share_nothing_or_a_wrong_name_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="share none of accuracy, reward and loss"):
        compare_report([run, tmp_path / "sft"], tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        compare_report([run], tmp_path / "out.pdf")


def test_the_command(tmp_path: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)

    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    done = call(one, "--out", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "there" / name) for name in ("learning_curve.png", "report.html")
    ]
    done = call(one, two, "--out", "both.png")
    assert (done.returncode, done.stdout) == (0, "both.png\n")
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    missing = call(tmp_path / "none")
    assert missing.returncode == 2
    assert re.fullmatch(r"error: .*metrics\.jsonl does not exist; .*\n", missing.stderr)


def test_rows_that_were_left_out_are_told_once() -> None:
    """Each start of a run logs them with its first step."""
    rows: list[dict[str, Any]] = [{"step": step, "time": 1.0, "loss": 1.0} for step in range(1, 4)]
    assert "rows of the data left out" not in dict(facts(rows))
    rows[0] |= {"data/left_out": 7.0}
    rows[2] |= {"data/left_out": 7.0, "data/heldout_left_out": 2.0}
    assert dict(facts(rows))["rows of the data left out"] == "7, held out 2"
