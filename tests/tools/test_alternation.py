"""Programs in turn: their medians, the table that compares them, what happens to one that fails or takes too long."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.bench.alternation import Run, alternate, median, run_all, spread, table, write_between


def run(*seconds: float, tokens: float = 100.0) -> Run:
    return {"steps": [{"generate": one / 4, "step": one, "tokens": tokens} for one in seconds]}


def test_sides_take_turns_and_one_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def side(name: str, fails: bool = False) -> Callable[[], Run]:
        def measure() -> Run:
            order.append(name)
            if fails:
                raise RuntimeError("it has no CPU build")
            return run(1.0)

        return measure

    results: dict[str, dict[str, list[Run]]] = {"case": {"a": [run(3.0)]}}
    kept: list[int] = []
    sides = {"a": side("a"), "b": side("b", fails=True), "c": side("c")}
    alternate(results, "case", sides, 2, lambda: kept.append(1))
    assert order == ["a", "b", "c", "a", "c"]
    assert {name: len(runs) for name, runs in results["case"].items()} == {"a": 3, "c": 2} and len(kept) == 4
    assert "case, b: it has no CPU build" in capsys.readouterr().err


def test_medians_are_over_the_steps_of_all_runs() -> None:
    runs = [run(1.0, 2.0), run(3.0, 10.0, 4.0)]
    assert median(runs, "step") == 3.0 and median(runs, "generate") == 0.75
    assert spread(runs, "step") == (2.0, 4.0)
    assert spread([run(1.0)], "step") == (1.0, 1.0)


def test_the_table_compares_tokens_a_second() -> None:
    """The peer makes half the tokens in a step of 4 s instead of 2: a quarter as fast."""
    results = {
        "0.66M/fixed": {"trl": [run(4.0, tokens=50.0)], "aligner": [run(2.0, 2.0)]},
        "other": {"bare": [run(1.0)]},
    }
    assert table(results, ("generate", "sync"), "tokens").splitlines()[2:] == [
        "| 0.66M/fixed | aligner | 0.500 | - | **2.00** | 2.00 to 2.00 | 50 |  |",
        "|  | trl | 1.00 | - | **4.00** | 4.00 to 4.00 | 12 | 4.00x as fast |",
        "| other | bare | 0.250 | - | **1.00** | 1.00 to 1.00 | 100 |  |",
    ]
    assert table({"other": {"bare": [run(1.0)]}}, (), "tokens").endswith(
        "| other | bare | **1.00** | 1.00 to 1.00 | 100 |  |"
    )


def test_the_table_stands_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    write_between(page, "a", "| new |")
    assert page.read_text() == "before\n<!-- a -->\n| new |\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="has no lines <!-- b --> and <!-- end of b -->"):
        write_between(page, "b", "")


def test_a_program_that_fails_or_takes_too_long_ends_all(tmp_path: Path) -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    fails = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match=r"failed:\nno such model"):
        run_all([sleeps, fails], 1, 30.0, tmp_path / "log")
    with pytest.raises(RuntimeError, match="took more than 0 s"):
        run_all([sleeps], 1, 0.1, tmp_path / "log")
