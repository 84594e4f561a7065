"""Several sources as one stream: shares, epochs, sources that run dry, and exact resume at any draw."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest

from aligner.data.curriculum import CurriculumStream
from aligner.data.mixture import MixedSource, Mixture, SourceStream, source_seed, source_weight
from aligner.data.mixture_config import CurriculumConfig, MixtureConfig
from aligner.data.prompts import Prompt
from aligner.data.stream import RowStream

SIZES = {"math": 11, "code": 4, "chat": 7}
WEIGHTS = {"math": 2.0, "code": 1.0, "chat": 1.0}
SUCCESS = CurriculumConfig(by="success", order="uncertain", retire_at=1.0)


def prompts(count: int, first: int = 0) -> list[Prompt]:
    return [Prompt((first + i,), str(first + i), {"level": -i}, first + i) for i in range(count)]


def mixture(
    sizes: Mapping[str, int] = SIZES,
    weights: Mapping[str, float] = WEIGHTS,
    seed: int = 3,
    curriculum: CurriculumConfig = CurriculumConfig(),  # noqa: B008
    **settings: Any,
) -> Mixture:
    config, sources, first = MixtureConfig(**settings), [], 0
    for name, count in sizes.items():
        rows, own = prompts(count, first), source_seed(seed, name, len(sizes) > 1)
        stream: SourceStream = RowStream(rows, own, replacement=config.replacement)
        if curriculum.by != "none":
            stream = CurriculumStream(rows, curriculum, own)
        sources.append(MixedSource(name, stream, first, count, weights.get(name, 1.0)))
        first += count
    return Mixture(sources, config, seed)


def indices(rows: Sequence[Prompt]) -> list[int]:
    return [row.index for row in rows]


def names(mixed: Mixture, rows: Sequence[Prompt]) -> list[str]:
    return [mixed.source_of(row.index).name for row in rows]


def test_one_source_is_drawn_as_without_a_mixture() -> None:
    for settings in ({}, {"batches": "single"}, {"exhausted": "all"}, {"exhausted": "first"}):
        mixed, alone = mixture({"data": 9}, **settings), RowStream(prompts(9), seed=3)
        assert [indices(mixed.take(4)) for _ in range(8)] == [indices(alone.take(4)) for _ in range(8)]
        assert mixed.draws == 0 and mixed.metrics() == {}, "a single source has no shares"


@pytest.mark.parametrize("batches", ["mixed", "single"])
def test_shares_are_within_sampling_error_of_the_weights(batches: str) -> None:
    """Each count of n draws is binomial: within 4 standard deviations of n p."""
    mixed, draws, size = mixture(batches=batches), 4000, 8
    steps = [names(mixed, mixed.take(size)) for _ in range(draws // (1 if batches == "single" else size))]
    if batches == "single":
        assert all(len(set(step)) == 1 for step in steps)
        drawn = Counter(step[0] for step in steps)
    else:
        assert sum(len(set(step)) > 1 for step in steps) > len(steps) / 2
        drawn = Counter(name for step in steps for name in step)
    for name, share in {"math": 0.5, "code": 0.25, "chat": 0.25}.items():
        assert abs(drawn[name] - draws * share) < 4 * math.sqrt(draws * share * (1 - share)), drawn


def test_the_metrics_are_the_shares_of_the_step() -> None:
    mixed = mixture()
    for _ in range(3):
        drawn = Counter(names(mixed, mixed.take(6) + mixed.take(2)))
        assert mixed.metrics() == {f"source/{name}_share": drawn[name] / 8 for name in SIZES}
    rewards = {0: [1.0, 0.25], 3: [1.0, 1.0], 11: [0.5, 0.0]}
    row = mixed.reward_metrics(rewards)
    assert row == {
        "source/math_reward": 3.25 / 4, "source/math_success": 3 / 4, "source/code_reward": 0.25, "source/code_success": 0.5,
    }  # fmt: skip


def test_temperature_by_hand() -> None:
    """sqrt(100) : sqrt(25) = 2 : 1; T=1 is by size; T=inf leaves the weights."""
    assert source_weight(1, 100, 2) / source_weight(1, 25, 2) == 2
    assert source_weight(3, 100, 1) / source_weight(1, 25, 1) == 12
    assert source_weight(3, 100, math.inf) == source_weight(3, 100, None) == 3
    mixed, draws = mixture({"large": 100, "small": 25}, {}, temperature=2.0), 3000
    drawn = Counter(names(mixed, mixed.take(draws)))
    assert abs(drawn["large"] - draws * 2 / 3) < 4 * math.sqrt(draws * 2 / 9)


def test_a_source_that_runs_dry_repeats() -> None:
    mixed = mixture()
    rows = mixed.take(600)
    for source in mixed.sources:
        own = [row.index for row in rows if source.first <= row.index < source.first + source.rows]
        epochs = [own[k : k + source.rows] for k in range(0, len(own) - source.rows + 1, source.rows)]
        assert all(sorted(epoch) == list(range(source.first, source.first + source.rows)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2, "reshuffled"
    assert mixed.epoch == 0


def test_an_epoch_of_all_has_each_row_once() -> None:
    mixed = mixture(exhausted="all")
    for epoch in range(5):
        rows = indices(mixed.take(sum(SIZES.values())))
        assert sorted(rows) == list(range(22)) and mixed.epoch == epoch
    one_by_one = mixture(exhausted="all")
    assert indices([one_by_one.take(1)[0] for _ in range(22 * 5)])[-22:] == rows


def test_an_epoch_of_the_first_ends_with_it() -> None:
    mixed, seen = mixture(exhausted="first"), []
    for _ in range(300):
        before = mixed.epoch
        (row,) = mixed.take(1)
        if mixed.epoch != before:
            counts = Counter(names(mixed, seen))
            assert len(set(indices(seen))) == len(seen), "no row twice in an epoch"
            assert [name for name in SIZES if counts[name] == SIZES[name]], counts
            assert names(mixed, seen[-1:])[0] in [name for name in SIZES if counts[name] == SIZES[name]]
            seen = []
        seen.append(row)
    assert mixed.epoch > 5


def test_batches_of_one_source_cover_it_once_an_epoch() -> None:
    """A batch that reaches into the next epoch has its rows early; they do not come twice."""
    mixed, drawn = mixture(batches="single", exhausted="all"), Counter[int]()
    while mixed.epoch < 6:
        drawn.update(indices(mixed.take(3)))
    epochs = {source.name: source.stream.epoch for source in mixed.sources}
    for source in mixed.sources:
        counts = [drawn[index] for index in range(source.first, source.first + source.rows)]
        assert set(counts) <= {epochs[source.name], epochs[source.name] + 1}


def test_with_replacement_rows_are_uniform() -> None:
    mixed, draws = mixture({"a": 5, "b": 5}, {}, replacement=True), 4000
    drawn = Counter(indices(mixed.take(draws)))
    assert all(abs(drawn[index] - draws / 10) < 5 * math.sqrt(draws * 0.09) for index in range(10)), drawn
    first = indices(mixture({"a": 500}, {}, replacement=True).take(500))
    assert len(set(first)) < 400, "an epoch repeats rows"


SETTINGS = [
    {"batches": batches, "exhausted": exhausted, "replacement": replacement, "curriculum": curriculum}
    for batches, exhausted, replacement, curriculum in product(
        ["mixed", "single"],
        ["repeat", "first", "all"],
        [False, True],
        [CurriculumConfig(), CurriculumConfig(by="column", column="level", fraction=0.5), SUCCESS],
    )
    if not replacement or (exhausted == "repeat" and curriculum.by == "none")
]


def measured(step: int, rows: Sequence[Prompt]) -> dict[int, list[float]]:
    """Rewards of two samples a row, which become better with the step."""
    return {row.index: [float((row.index + k) % 9 < step) for k in range(2)] for row in rows}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, list(settings.values())[:3])))
def test_resume_at_any_step(settings: dict[str, Any]) -> None:
    """What was drawn before a step, as JSON, gives the same draws from there on."""
    mixed, states, drawn = mixture(**settings), [], []
    for step in range(24):
        states.append(json.dumps(mixed.state_dict()))
        rows = mixed.take(5)
        mixed.record(measured(step, rows))
        drawn.append(indices(rows))
    for begin in range(0, 24, 1):
        again = mixture(**settings)
        again.load_state_dict(json.loads(states[begin]))
        for step in range(begin, min(begin + 8, 24)):
            rows = again.take(5)
            assert indices(rows) == drawn[step], (begin, step)
            again.record(dict(reversed(measured(step, rows).items())))  # ranks hear of them in any order


def test_another_seed_draws_otherwise() -> None:
    draws = {seed: indices(mixture(seed=seed).take(40)) for seed in range(4)}
    assert len(set(map(tuple, draws.values()))) == 4
    assert source_seed(3, "math", True) != source_seed(3, "code", True) and source_seed(3, "data", False) == 3


def test_other_sources_are_refused_unless_the_change_is_accepted() -> None:
    mixed = mixture()
    before = indices(mixed.take(30))
    state = json.loads(json.dumps(mixed.state_dict()))
    other = mixture({"math": 11, "news": 5})
    with pytest.raises(ValueError, match="has the sources chat, code, math but this run has math, news; resume"):
        other.load_state_dict(state)
    other.load_state_dict(state, accept_changes=True)
    assert other.sources[0].stream.state_dict()["position"] == sum(index < 11 for index in before)
    assert other.sources[1].stream.state_dict()["position"] == 0
    with pytest.raises(ValueError, match="rows=11 but this run has rows=12"):
        mixture({**SIZES, "math": 12}).load_state_dict(state)
    with pytest.raises(ValueError, match="of an earlier version"):
        mixed.load_state_dict({"position": 3, "rows": 11})
