"""The engine against transformers: same tokens, same log-probabilities, and samples that depend on their seed only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from aligner.reshard.weights import WritableWeights
from aligner.rollout.config import Sampling
from aligner.rollout.engine import RolloutEngine
from tests.rollout import tiny

Loaded = tuple[Any, RolloutEngine, WritableWeights]
GREEDY = Sampling(temperature=0.0, max_tokens=24, stop_token_ids=())
DRAWN = Sampling(temperature=0.7, max_tokens=24, stop_token_ids=())


def test_greedy_tokens_and_log_probabilities(loaded: Loaded) -> None:
    model, engine, _ = loaded
    asked = tiny.prompts(6)
    for prompt, (completion,) in zip(asked, engine.generate(asked, [0] * 6, GREEDY), strict=True):
        assert completion.tokens == tiny.greedy(model, prompt, 24)
        assert tiny.gap(model, prompt, completion) < 1e-4
        assert completion.truncated


def test_log_probabilities_are_those_of_the_distribution_drawn_from(loaded: Loaded) -> None:
    model, engine, _ = loaded
    asked = tiny.prompts(6)
    groups = engine.generate(asked, list(range(0, 600, 100)), DRAWN, 3)
    assert all(len({tuple(one.tokens) for one in group}) == 3 for group in groups)
    gaps = [tiny.gap(model, prompt, one, 0.7) for prompt, group in zip(asked, groups, strict=True) for one in group]
    assert max(gaps) < 1e-4
    assert max(tiny.gap(model, asked[0], one) for one in groups[0]) > 0.01  # the temperature does show


def test_second_sync_takes_effect(loaded: Loaded) -> None:
    model, engine, weights = loaded
    asked = tiny.prompts(4)
    before = engine.generate(asked, [0] * 4, GREEDY)
    changed = copy.deepcopy(model)
    torch.manual_seed(99)
    tiny.randomize(changed)
    tiny.write(weights, changed)
    after = engine.generate(asked, [0] * 4, GREEDY)
    for prompt, (completion,) in zip(asked, after, strict=True):
        assert completion.tokens == tiny.greedy(changed, prompt, 24)
        assert tiny.gap(changed, prompt, completion) < 1e-4
    assert after != before
    tiny.write(weights, model)
    assert engine.generate(asked, [0] * 4, GREEDY) == before


def test_samples_depend_on_their_seed_only(loaded: Loaded) -> None:
    _, engine, _ = loaded
    asked, seeds = tiny.prompts(10), [1 << 47, *range(7, 97, 10)]
    one_order = engine.generate(asked, seeds, DRAWN, 2)
    torch.manual_seed(1234)
    other_order = engine.generate(asked[::-1], seeds[::-1], DRAWN, 2)[::-1]
    assert [[one.tokens for one in group] for group in one_order] == [
        [one.tokens for one in group] for group in other_order
    ]
    (alone,) = engine.generate([asked[3]], [seeds[3] + 1], DRAWN)
    assert alone[0].tokens == one_order[3][1].tokens
    other_seeds = engine.generate(asked, [seed + 5 for seed in seeds], DRAWN, 2)
    assert all(a[0].tokens != b[0].tokens for a, b in zip(one_order, other_seeds, strict=True))


def test_stop_token_is_included(loaded: Loaded) -> None:
    model, engine, _ = loaded
    (prompt,) = tiny.prompts(1)
    free = tiny.greedy(model, prompt, 24)
    stop = free[9]
    wanted = free[: free.index(stop) + 1]
    ((completion,),) = engine.generate([prompt], [0], Sampling(temperature=0.0, max_tokens=24, stop_token_ids=(stop,)))
    assert completion.tokens == wanted
    assert len(completion.logp) == len(wanted)
    assert not completion.truncated


def test_by_default_the_models_own_end_token_stops(loaded: Loaded) -> None:
    _, engine, _ = loaded
    asked = tiny.prompts(8)
    groups = engine.generate(asked, list(range(0, 8000, 1000)), Sampling(temperature=2.0, max_tokens=80), 8)
    responses = [one for group in groups for one in group]
    assert any(one.tokens[-1] == tiny.EOS for one in responses)
    for one in responses:
        assert tiny.EOS not in one.tokens[:-1]
        assert one.truncated == (one.tokens[-1] != tiny.EOS)


def test_greedy_groups_and_no_prompts(loaded: Loaded) -> None:
    _, engine, _ = loaded
    (group,) = engine.generate(tiny.prompts(1), [0], GREEDY, 3)
    assert len(group) == 3
    assert group[0] == group[1] == group[2]
    assert engine.generate([], [], GREEDY, 3) == []


def test_errors_name_the_setting(loaded: Loaded) -> None:
    _, engine, _ = loaded
    with pytest.raises(ValueError, match=r"rollout\.max_model_len=96; use rollout\.max_model_len=104 or more"):
        engine.generate([[5] * 80], [0], GREEDY)
    with pytest.raises(ValueError, match=r"rollout\.max_model_len=96; the model ends at 128"):
        engine.generate([[5] * 120], [0], GREEDY)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[5], []], [0, 1], GREEDY)
    with pytest.raises(ValueError, match="prompt 0 holds token 100, outside the model's vocabulary of 100"):
        engine.generate([[5, 100]], [0], GREEDY)
    with pytest.raises(ValueError, match=r"sampling\.top_p=0\.0"):
        engine.generate([[5]], [0], Sampling(top_p=0.0))
    assert engine.generate([[5] * 72], [0], GREEDY)[0][0].truncated  # 72 + 24 = 96 fits
