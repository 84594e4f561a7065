"""Which weights a rollout's engines hold, through syncs, failures, evictions and several policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from aligner.rollout.loaded import Holding, LoadedWeights


@dataclass(eq=False)
class Source:
    """A policy, as far as the record knows it."""

    name: str
    version: int = 0
    asked: list[Any] = field(default_factory=list)

    def reshard_to(self, rollout: Any) -> None:
        self.asked.append(rollout)


def sync(loaded: LoadedWeights, source: Source) -> None:
    with loaded.loading(source):
        assert not loaded.complete


def test_nothing_until_the_first_sync() -> None:
    loaded, policy = LoadedWeights(), Source("policy")
    assert not loaded.complete and not loaded.current(policy)
    assert loaded.source_to_reload("rollout") is None
    with pytest.raises(RuntimeError, match=r"no weights yet; call policy\.reshard_to\(rollout\) first"):
        loaded.check()
    sync(loaded, policy)
    loaded.check()
    assert loaded.current(policy) and (loaded.source, loaded.version) == (policy, 0)


def test_an_update_makes_them_old_and_another_policy_makes_them_anothers() -> None:
    loaded, one, other = LoadedWeights(), Source("policy", 3), Source("second", 3)
    sync(loaded, one)
    one.version += 1
    assert not loaded.current(one) and loaded.complete and loaded.version == 3
    sync(loaded, one)
    sync(loaded, other)
    assert loaded.current(other) and not loaded.current(one), "what one sent has been overwritten"
    assert loaded.version == 3


@pytest.mark.parametrize("own_part_finished", [False, True])
def test_a_sync_that_fails_leaves_no_valid_weights(own_part_finished: bool) -> None:
    loaded, policy = LoadedWeights(), Source("policy", 1)
    sync(loaded, policy)

    def fail() -> None:
        with loaded.loading(policy):
            if own_part_finished:
                loaded.finish()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert loaded.holding is Holding.PARTIAL and not loaded.current(policy)
    assert loaded.source_to_reload("rollout") is None
    with pytest.raises(RuntimeError, match=r"last sync did not finish; call policy\.reshard_to\(rollout\) once more"):
        loaded.check()


def test_given_up_weights_come_from_their_source_while_it_has_them() -> None:
    loaded, policy = LoadedWeights(), Source("second", 5)
    loaded.evict()
    assert loaded.evicted and loaded.source_to_reload("rollout") is None, "there never were any"
    sync(loaded, policy)
    assert loaded.source_to_reload("rollout") is None
    loaded.evict()
    with pytest.raises(RuntimeError, match="they were given up to make room"):
        loaded.check()
    assert not loaded.current(policy) and loaded.source_to_reload("rollout") is policy
    policy.version += 1
    with pytest.raises(RuntimeError, match=r"judge\.generate.*second has been updated.*second\.reshard_to\(judge\)"):
        loaded.source_to_reload("judge")
    sync(loaded, policy)
    assert loaded.complete and not loaded.evicted


def test_a_first_source_is_asked_when_weights_are_first_needed() -> None:
    folder, policy = Source("the folder"), Source("policy", 2)
    loaded = LoadedWeights(folder)
    assert loaded.source_to_reload("judge") is folder
    sync(loaded, policy)
    assert loaded.source_to_reload("judge") is None and loaded.version == 2
