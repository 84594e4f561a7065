"""Streamed sets: the examples of each row in their order, tokenized ahead, with an exact position."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.data.left_out import LeftOut
from aligner.data.row_tokenizer import RowErrors
from aligner.data.sources.source import RowList
from aligner.data.streamed import ExampleStream, StreamedExamples


class Repeats:
    """A row {"n": 2, "is": "a"} gives the examples "a0" and "a1"; n = 0 leaves it out, n = -1 is a mistake."""

    def __init__(self) -> None:
        self.left_out: LeftOut = Counter()
        self.threads: set[int] = set()

    def __call__(self, label: str, row: dict[str, Any], index: int) -> list[str]:
        self.threads.add(threading.get_ident())
        if row["n"] < 0:
            raise ValueError(f"{label}: n is {row['n']}.")
        self.left_out["none"] += row["n"] == 0
        return [f"{row['is']}{k}" for k in range(row["n"])]

    def none_left(self) -> str:
        return f"nothing is left ({dict(self.left_out)})."


def stream(counts: list[int], seed: int = 0, shuffle: bool = True, on_error: str = "stop") -> ExampleStream[str]:
    source = RowList("data.path=p", [(f"p:{i + 1}", {"n": n, "is": f"{i}."}) for i, n in enumerate(counts)])
    return ExampleStream(StreamedExamples(source, Repeats(), RowErrors(on_error), 9), seed, shuffle, batch=3)


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=12).filter(any),
    takes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    cut=st.integers(0, 7),
    shuffle=st.booleans(),
)
def test_every_example_once_an_epoch_and_positions_restore_exactly(
    counts: list[int], takes: list[int], cut: int, shuffle: bool
) -> None:
    whole = stream(counts, shuffle=shuffle)
    batches = [whole.take(count) for count in takes]
    assert [len(batch) for batch in batches] == takes
    dealt, each = [example for batch in batches for example in batch], sum(counts)
    for start in range(0, len(dealt) - each + 1, each):
        assert len(set(dealt[start : start + each])) == each
    if not shuffle:
        epoch = [f"{i}.{k}" for i, n in enumerate(counts) for k in range(n)]
        assert dealt == [epoch[place % each] for place in range(len(dealt))]
    before = stream(counts, shuffle=shuffle)
    for count in takes[:cut]:
        before.take(count)
    state = json.loads(json.dumps(before.state_dict()))
    after = stream(counts, shuffle=shuffle)
    after.load_state_dict(state)
    assert [after.take(count) for count in takes[cut:]] == batches[cut:]
    assert after.left_out == whole.left_out


def test_rows_are_tokenized_by_a_thread_that_stays_ahead() -> None:
    rows = stream([1] * 40)
    rows.take(1)
    tokenize = rows._set.tokenize
    assert isinstance(tokenize, Repeats)
    assert threading.get_ident() not in tokenize.threads and len(tokenize.threads) == 1
    assert rows.metrics()["data/wait_seconds"] > 0
    assert rows.metrics() == {"data/wait_seconds": 0.0}


def test_a_wrong_row_stops_when_its_turn_comes() -> None:
    rows = stream([1, 1, -1, 1], shuffle=False)
    assert rows.take(2) == ["0.0", "1.0"]
    for _ in range(2):  # it stays at that row
        with pytest.raises(ValueError, match=r"^p:3: n is -1"):
            rows.take(1)


def test_a_wrong_row_is_skipped_and_counted() -> None:
    rows = stream([1, 0, -1, 1], shuffle=False, on_error="skip")
    assert rows.take(3) == ["0.0", "3.0", "0.0"]
    assert rows.left_out == {"none": 1, "wrong rows": 1}
    assert rows.metrics()["data/left_out"] == 2
    again = stream([1, 0, -1, 1], shuffle=False, on_error="skip")
    again.load_state_dict(rows.state_dict())
    again.take(1)
    assert again.metrics()["data/left_out"] == 4, "the second pass leaves them out again"


@pytest.mark.parametrize("counts", [[0, 0], [-1, -1]])
def test_an_epoch_without_an_example_is_an_error(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="nothing is left"):
        stream(counts, on_error="skip").take(1)


def test_a_position_in_other_rows_is_refused_or_accepted() -> None:
    before = stream([2, 2, 2])
    before.take(3)
    state = before.state_dict()
    for counts, seed, problem in (([2, 2], 0, "rows=3"), ([2, 2, 2], 1, "seed=0"), ([2, 2, 1], 0, "other rows")):
        with pytest.raises(ValueError, match=problem):
            stream(counts, seed).load_state_dict(state)
    after = stream([2, 2, 1])
    after.load_state_dict(state, accept_changes=True)
    assert (after.position, after.state_dict()["offset"]) == (1, 1)
    after = stream([2, 2])
    after.load_state_dict(state, accept_changes=True)
    assert (after.position, after.state_dict()["offset"]) == (2, 0), "a whole pass over them"
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
        stream([1], seed=-1)
