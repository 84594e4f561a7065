"""Streams on real ranks with both real engines: what is generated ahead, carried over or met by new weights."""

from __future__ import annotations

from typing import Any

import pytest

from tests.algorithms.conftest import alike
from tests.algorithms.streams_on_ranks import BOUNDS
from tests.conftest import Ranks

SPLIT = ["placement=split"]
LAYOUTS = {
    "split": (2, SPLIT),
    # without residency: to make room, an engine completes what is under way
    "colocated, tensor 2": (2, ["placement.policy.tensor=2", "placement.rollout.tensor=2", "residency.mode=off"]),
    "split, transformers engine": (2, [*SPLIT, "rollout.engine=transformers"]),
    "two replicas": (3, [*SPLIT, "placement.rollout.ranks=[1,2]"]),
}
Said = dict[str, Any]


@pytest.fixture(scope="module")
def cache() -> dict[str, Said]:
    return {}


@pytest.fixture(
    params=[
        "split",
        *(
            pytest.param(name, marks=pytest.mark.matrix)
            for name in ("split, transformers engine", "colocated, tensor 2", "two replicas")
        ),
    ]
)
def said(request: pytest.FixtureRequest, cache: dict[str, Said], task: Any, ranks: Ranks) -> Said:
    """What all ranks say alike under a layout."""
    if request.param not in cache:
        size, overrides = LAYOUTS[request.param]
        pool = ranks(size)
        cache[request.param] = alike(
            pool.run("tests.algorithms.streams_on_ranks:run_streams", task.folder, overrides, seconds=400)
        )
        pool.close()  # it holds the engine of this layout
    return cache[request.param]


@pytest.mark.parametrize("stream", ["lag 0", "lag 1", "lag 2", "in flight"])
def test_what_is_generated_ahead_is_what_generate_makes(said: Said, stream: str) -> None:
    assert len(said["plain"]) == 6
    assert said[stream] == said["plain"]


@pytest.mark.parametrize("stream", ["partial", "partial, ahead", "partial, two ahead"])
def test_what_is_carried_over_is_what_it_would_have_been(said: Said, stream: str) -> None:
    """Every group, whole, with the tokens of an uninterrupted generation; some were carried over, some not."""
    plain = [tuple(map(str, row)) for batch in said["plain"] for row in batch]
    found = [tuple(map(str, row)) for batch in said[stream] for row in batch]
    assert sorted(found) == sorted(plain)
    assert found != plain
    for batch in said[stream]:
        assert [row[0] for row in batch[::2]] == [row[0] for row in batch[1::2]], "a group's samples stay together"
    assert [len(batch) for batch in said[stream]] == [8] * 6
    lengths = {len(tokens) for batch in said["plain"] for _, tokens in batch}
    assert min(lengths) <= 6 < 12 < max(lengths)


def test_all_layouts_draw_the_same(cache: dict[str, Said], said: Said) -> None:
    for other in cache.values():
        assert other["plain"] == said["plain"]
        for stream in ("partial", "partial, ahead", "partial, two ahead"):
            assert other[stream] == said[stream]
        for lengths in ("equal", "unequal"):
            assert other[f"bounds, {lengths} lengths"] == said[f"bounds, {lengths} lengths"]


@pytest.mark.parametrize(
    ("stream", "staleness"),
    [("lag 0", [0, 0, 0, 0, 0, 0]), ("lag 2", [0, 1, 2, 2, 2, 2])],
)
def test_staleness_is_the_lag(said: Said, stream: str, staleness: list[int]) -> None:
    found = said[f"training, {stream}"]
    assert found["staleness"] == [[n, n] for n in staleness]
    assert found["versions"] == [[step - n] for step, n in enumerate(staleness)]


def test_no_more_is_under_way_than_the_lag_and_the_rounds_ask_for(said: Said) -> None:
    """R + lag batches, R = ceil(20 / step_tokens), whose tokens are R + lag - 1 updates old when all take R rounds."""
    rounds = [(lag, -(-20 // step_tokens)) for lag, step_tokens in BOUNDS]
    assert [most for _, most in rounds] == [1, 2, 4] * 3
    assert said["bounds, equal lengths"] == [[most + lag, most + lag - 1] for lag, most in rounds]
    for (lag, most), (batches, oldest) in zip(rounds[2::3], said["bounds, unequal lengths"], strict=True):
        assert 1 + lag < batches <= most + lag
        assert lag <= oldest <= max(most, 2 * most - 2) + lag - 1


@pytest.mark.parametrize("stream", ["in flight", "partial"])
def test_a_sample_may_be_drawn_by_several_versions(said: Said, stream: str) -> None:
    found = said[f"training, {stream}"]
    assert any(len(versions) > 1 for versions in found["versions"])
    for step, (mean, most) in enumerate(found["staleness"]):
        assert 0 <= mean <= most <= 4
        assert max(found["versions"][step]) <= step
        assert most == step - min(found["versions"][step])


def test_weights_that_arrive_in_the_middle_of_a_response(said: Said, request: pytest.FixtureRequest) -> None:
    """Each token's log-probability is transformers' under the weights of its version, and not under the others'."""
    found = said["training, in flight, long"]
    assert found["worst"] < 1e-4
    if "colocated" not in request.node.callspec.id:  # there the policy has its weights as soon as the engine is asked
        assert found["mixed"] >= 4 and len(found["versions"]) >= 3
        assert found["wrong"] > 1e-2


@pytest.mark.parametrize("stream", ["lag 0", "lag 2", "in flight", "partial", "partial, ahead"])
def test_each_token_was_drawn_by_the_weights_of_its_version(said: Said, stream: str) -> None:
    """The policy's log-probabilities under that version's weights are the engine's; under another's they are not."""
    found = said[f"training, {stream}"]
    assert found["worst"] < 1e-4
    assert found["wrong"] > 1e-2
