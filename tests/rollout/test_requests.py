"""Samples that are interrupted, read anew or met by new weights are the samples that they would have been."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from aligner.reshard.weights import WritableWeights
from aligner.rollout.config import Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.requests import Sample
from tests.rollout import tiny

Loaded = tuple[Any, RolloutEngine, WritableWeights]
GREEDY = Sampling(temperature=0.0, max_tokens=24, stop_token_ids=())
DRAWN = Sampling(temperature=0.9, max_tokens=24, stop_token_ids=(3, 4, 5, 6, 7, 8))
SEEDS = [0, 1000, 2000, 3000, 4000, 5000]


def whole(engine: RolloutEngine, sampling: Sampling) -> list[Sample]:
    return [one for group in engine.generate(tiny.prompts(6), SEEDS, sampling) for one in group]


def same(ours: list[Sample], reference: list[Sample]) -> None:
    assert [one.tokens for one in ours] == [one.tokens for one in reference]
    assert [(one.ended, one.truncated) for one in ours] == [(one.ended, one.truncated) for one in reference]
    for one, other in zip(ours, reference, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=2e-5)
        assert len(one.versions) == len(one.tokens)


def mark(engine: RolloutEngine, version: int) -> None:
    """As after a sync of this version."""
    engine.loaded.version = version
    engine.requests.new_weights()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "seeded"])
@pytest.mark.parametrize("step_tokens", [1, 5, 24])
def test_an_interrupted_sample_goes_on_as_if_it_had_not_been(
    loaded: Loaded, sampling: Sampling, step_tokens: int
) -> None:
    _, engine, _ = loaded
    reference = whole(engine, sampling)
    assert len({len(one.tokens) for one in reference}) > 1 or sampling is GREEDY
    samples = [Sample(list(prompt), seed) for prompt, seed in zip(tiny.prompts(6), SEEDS, strict=True)]
    for _ in range(-(-24 // step_tokens)):
        left = [one for one in samples if not one.ended]
        before = [len(one.tokens) for one in left]
        grown = engine.finish(engine.resume(left, sampling, step_tokens))
        assert all(len(one.tokens) <= n + step_tokens for one, n in zip(grown, before, strict=True))
        parts = iter(grown)
        samples = [one if one.ended else next(parts) for one in samples]
        engine.new_weights()  # as a sync would: nothing of the KV cache is left
    same(samples, reference)


def test_a_sample_that_has_more_than_a_lower_limit_has_ended(loaded: Loaded) -> None:
    """A run goes on from a checkpoint with a smaller sampling.max_tokens."""
    _, engine, _ = loaded
    samples = [Sample(list(prompt), seed) for prompt, seed in zip(tiny.prompts(6), SEEDS, strict=True)]
    samples = engine.finish(engine.resume(samples, GREEDY, 5)) + engine.finish(engine.resume(samples[:2], GREEDY, 2))
    ended = engine.finish(engine.resume(samples, replace(GREEDY, max_tokens=4)))
    assert [one.tokens for one in ended[:6]] == [one.tokens for one in samples[:6]], "nothing is taken away"
    assert [len(one.tokens) for one in ended] == [5] * 6 + [4] * 2
    assert all(one.ended and one.truncated for one in ended) and not engine.requests.under_way


def test_started_samples_share_the_engine_and_stay_apart(loaded: Loaded) -> None:
    _, engine, _ = loaded
    reference = whole(engine, DRAWN)
    asked = tiny.prompts(6)
    first = engine.start(asked[:3], SEEDS[:3], DRAWN)
    asked_for = iter([False] * 4 + [True])
    engine.work_until(lambda: next(asked_for))
    assert engine.requests.under_way
    later = engine.start(asked[3:], SEEDS[3:], DRAWN)
    assert engine.generate([asked[0]], [SEEDS[0]], DRAWN)[0][0].tokens == reference[0].tokens
    same(engine.finish(later), reference[3:])
    same(engine.finish(first), reference[:3])
    assert not engine.requests.under_way


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_a_sync_of_the_same_weights_in_flight_changes_nothing(loaded: Loaded, sampling: Sampling) -> None:
    model, engine, weights = loaded
    reference = whole(engine, sampling)
    ticket = engine.start(tiny.prompts(6), SEEDS, sampling)
    for version in (7, 8):
        tokens = iter([False] * 4 + [True])
        engine.work_until(lambda tokens=tokens: next(tokens))  # type: ignore[misc]
        tiny.write(weights, model)
        mark(engine, version)
    same(engine.finish(ticket), reference)
    mark(engine, 0)


def test_each_token_is_drawn_by_the_weights_that_its_version_names(loaded: Loaded) -> None:
    """Against transformers: log-probabilities before the sync are the old model's, after it the new one's, whose
    context is the whole sample so far."""
    model, engine, weights = loaded
    changed = copy.deepcopy(model)
    torch.manual_seed(99)
    tiny.randomize(changed)
    sampling = replace(DRAWN, temperature=1.0, stop_token_ids=())
    mark(engine, 3)
    ticket = engine.start(tiny.prompts(6), SEEDS, sampling)
    tokens = iter([False] * 7 + [True])
    engine.work_until(lambda: next(tokens))
    tiny.write(weights, changed)
    mark(engine, 4)
    found = engine.finish(ticket)
    for prompt, one in zip(tiny.prompts(6), found, strict=True):
        assert one.versions == [3] * 7 + [4] * 17
        old, new = (tiny.log_probabilities(m, prompt, one.tokens) for m in (model, changed))
        expected = torch.where(torch.tensor(one.versions) == 3, old, new)
        assert (torch.tensor(one.logp) - expected).abs().max() < 1e-4
        assert (old - new).abs().max() > 0.1
    tiny.write(weights, model)
    mark(engine, 0)


def test_a_failed_step_leaves_nothing_under_way(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine, _ = loaded
    reference = whole(engine, DRAWN)
    engine.start(tiny.prompts(6), SEEDS, DRAWN)
    with monkeypatch.context() as patch:
        patch.setattr(engine.requests, "progress", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.work_until(lambda: False)
    assert not engine.requests.under_way
    same(whole(engine, DRAWN), reference)
