"""Episodes on real ranks: equal under every layout and in any order of answers, in every stream, after a resume."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Ranks
from tests.e2e.conftest import Task, task

__all__ = ["task"]
LAYOUTS: dict[str, tuple[int, list[str], list[str]]] = {
    "one rank": (1, [], ["shuffled", "failing"]),
    "tensor 2": (2, ["placement.policy.tensor=2", "placement.rollout.tensor=2"], ["shuffled", "streams", "failing"]),
    "two replicas": (2, [], ["shuffled", "resume"]),
    "split": (2, ["placement=split"], ["streams", "training", "resume"]),
    "split, transformers": (2, ["placement=split", "rollout.engine=transformers"], ["streams", "training", "resume"]),
    "pipeline 2": (2, ["placement.policy.tensor=2", "placement.rollout.pipeline=2"], ["shuffled"]),
}
DEFAULT = ("one rank", "tensor 2", "split")
Found = dict[str, Any]


@pytest.fixture(scope="module")
def cache() -> dict[str, list[Found]]:
    return {}


@pytest.fixture(params=[pytest.param(n, marks=() if n in DEFAULT else pytest.mark.matrix) for n in LAYOUTS])
def found(request: pytest.FixtureRequest, cache: dict[str, list[Found]], task: Task, ranks: Ranks) -> Found:
    """What the ranks have found under a layout; all the same, but for what they say of errors."""
    if request.param not in cache:
        size, overrides, scenes = LAYOUTS[request.param]
        pool = ranks(size)
        arguments = (task.folder, overrides, scenes)
        cache[request.param] = pool.run("tests.rollout.episodes.play_on_ranks:run_episodes", *arguments, seconds=400)
        pool.close()  # it holds the engine of this layout
    first, *others = ({name: value for name, value in one.items() if name != "said"} for one in cache[request.param])
    assert all(other == first for other in others), "the ranks disagree"
    return first


def scene(found: Found, name: str) -> Any:
    if name not in found:
        pytest.skip("another layout does this")
    return found[name]


def drawn(batches: Any) -> list[Any]:
    """All but log-probabilities, which other layouts round otherwise."""
    return [[{name: value for name, value in row.items() if name != "logp"} for row in batch] for batch in batches]


def by_row(batches: Any) -> list[str]:
    return sorted(str(row) for batch in drawn(batches) for row in batch)


def test_all_layouts_play_the_same(cache: dict[str, list[Found]], found: Found) -> None:
    assert max(max(row["turn"]) for batch in found["plain"] for row in batch) == 4
    assert {row["ended"] for batch in found["plain"] for row in batch} == {"done", "crashed"}
    for other in cache.values():
        assert drawn(other[0]["plain"]) == drawn(found["plain"])


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_in_any_order_and_at_any_time_change_no_bit(found: Found, seed: int) -> None:
    """vLLM on a CPU: not even the log-probabilities depend on which requests share a step."""
    assert scene(found, f"shuffled {seed}") == found["plain"]


@pytest.mark.parametrize("stream", ["lag 0", "lag 1", "in flight"])
def test_what_is_played_ahead_is_what_play_makes(found: Found, stream: str) -> None:
    assert drawn(scene(found, f"stream, {stream}")) == drawn(found["plain"])


@pytest.mark.parametrize("stream", ["partial", "partial, ahead"])
def test_what_goes_on_in_a_later_step_is_what_it_would_have_been(found: Found, stream: str) -> None:
    assert by_row(scene(found, f"stream, {stream}")) == by_row(found["plain"])


@pytest.mark.parametrize("stream", ["lag 0", "lag 1", "in flight", "partial", "partial, ahead"])
def test_each_token_was_drawn_by_the_weights_of_its_version(found: Found, stream: str) -> None:
    training = scene(found, f"training, {stream}")
    assert training["worst"] < 1e-4
    assert len(training["versions"]) > 1
    if stream in ("in flight", "partial", "partial, ahead"):
        assert training["several"] > 0, "no episode was drawn by several versions"


@pytest.mark.parametrize("stream", ["lag 0", "partial"])
def test_weights_do_not_depend_on_the_order_of_answers(
    found: Found, stream: str, request: pytest.FixtureRequest
) -> None:
    """To the last bit with vLLM: tokens, rewards, log-probabilities, weights."""
    training, shuffled = scene(found, f"training, {stream}"), found[f"training, {stream}, shuffled"]
    assert drawn(shuffled["rows"]) == drawn(training["rows"])
    if "transformers" not in request.node.callspec.id:
        assert shuffled["rows"] == training["rows"]
        assert shuffled["weights"] == training["weights"]


def test_unfinished_episodes_go_on_after_a_resume(found: Found) -> None:
    assert drawn(scene(found, "resumed")) == drawn(found["whole"])


def test_a_source_that_fails_ends_all_ranks_of_its_replica(cache: dict[str, list[Found]], found: Found) -> None:
    for layout, said in cache.items():
        if "said" in said[0]:
            assert said[0]["said"] == "OSError: the environment's machine is gone", layout
            for other in said[1:]:
                assert (
                    "OSError: the environment's machine is gone; the first rank of this rollout replica says more"
                    in other["said"]
                )
