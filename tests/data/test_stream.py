"""Endless streams: every row once an epoch, exact positions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner.data.stream import RowStream


@given(
    rows=st.integers(1, 30),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    cut=st.integers(0, 11),
)
def test_every_epoch_is_a_permutation_and_positions_restore_exactly(
    rows: int, counts: list[int], seed: int, cut: int
) -> None:
    stream = RowStream(range(rows), seed)
    batches = [stream.take(count) for count in counts]
    dealt = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == counts
    for start in range(0, len(dealt) - rows + 1, rows):
        assert sorted(dealt[start : start + rows]) == list(range(rows))
    assert stream.epoch == len(dealt) // rows

    before = RowStream(range(rows), seed)
    for count in counts[:cut]:
        before.take(count)
    resumed = RowStream(range(rows), seed)
    resumed.load_state_dict(before.state_dict())
    assert [resumed.take(count) for count in counts[cut:]] == batches[cut:]


def test_epochs_and_seeds_differ() -> None:
    stream = RowStream(range(1000), seed=0)
    first, second = stream.take(1000), stream.take(1000)
    assert first != second
    assert first != list(range(1000))
    assert RowStream(range(1000), seed=1).take(1000) not in (first, second)
    assert RowStream(range(1000), seed=0).take(1000) == first


def test_without_shuffling_the_files_order_stays() -> None:
    assert RowStream("abc", seed=5, shuffle=False).take(7) == list("abcabca")


def test_a_position_in_other_data_is_refused() -> None:
    state = RowStream(range(10), seed=0).state_dict()
    for other, name in (
        (RowStream(range(11), seed=0), "rows=10"),
        (RowStream(range(10), seed=1), "seed=0"),
        (RowStream(range(10), seed=0, shuffle=False), "shuffle=True"),
    ):
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
        RowStream(range(10), seed=-1)


def test_other_rows_of_the_same_number_are_refused_or_accepted() -> None:
    before = RowStream(["a", "b", "c", "d"], seed=0)
    before.take(2)
    saved = json.loads(json.dumps(before.state_dict()))
    for rows in (["w", "x", "y", "z"], ["b", "a", "c", "d"], ["a", "b", "c", "e"]):
        with pytest.raises(ValueError, match=r"other rows .*checkpoint\.accept_changes=true"):
            RowStream(rows, seed=0).load_state_dict(saved)
        after = RowStream(rows, seed=0)
        after.load_state_dict(saved, accept_changes=True)
        assert after.position == 2
    same = RowStream(["a", "b", "c", "d"], seed=0)
    same.load_state_dict(saved)
    assert same.take(2) == before.take(2)


@pytest.mark.parametrize(("rows", "position"), [(list("abcdef"), 6), (list("ab"), 2)])
def test_accepted_rows_of_another_number_begin_with_a_pass_over_them(rows: list[str], position: int) -> None:
    before = RowStream(["a", "b", "c", "d"], seed=0)
    before.take(3)
    after = RowStream(rows, seed=0)
    after.load_state_dict(before.state_dict(), accept_changes=True)
    assert after.position == position
    assert sorted(after.take(len(rows))) == rows


def test_a_state_of_an_earlier_version_has_no_digest() -> None:
    before = RowStream(["a", "b"], seed=0)
    before.take(1)
    state = before.state_dict()
    del state["digest"]
    after = RowStream(["x", "y"], seed=0)
    after.load_state_dict(state)
    assert after.position == 1
