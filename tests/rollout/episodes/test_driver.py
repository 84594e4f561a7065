"""Episodes on both real engines, with an environment of a few lines: exact tokens, any order of answers, interruptions, replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch

from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.reshard.weights import WritableWeights
from aligner.rollout.config import Sampling
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.episodes.driver import Episodes
from aligner.rollout.episodes.episode import Episode
from aligner.rollout.episodes.source import Ask, Ended, EpisodeSource
from aligner.rollout.kind import Place
from aligner.rollout.requests import Sample
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.sizes import BLOCK_TOKENS
from tests.rollout import tiny
from tests.rollout.episodes.forked import BRANCHES, LENGTH, Forked
from tests.rollout.episodes.scripted import Scripted

Loaded = tuple[Any, RolloutEngine, WritableWeights]
SAMPLING = Sampling(temperature=0.9, max_tokens=8, stop_token_ids=(3, 4, 5, 6, 7, 8))


def tasks() -> list[Prompt]:
    return [Prompt(tuple(tokens), f"task {i}", {"number": i}, i) for i, tokens in enumerate(tiny.prompts(6))]


def begun(driver: Episodes) -> list[Episode]:
    return [driver.begin(task, Place(1, 1, i, g)) for i, task in enumerate(tasks()) for g in range(2)]


def driver_of(engine: RolloutEngine, source: EpisodeSource) -> Episodes:
    return Episodes(engine, source, lambda: None)


def play(engine: RolloutEngine, source: EpisodeSource, sampling: Sampling = SAMPLING) -> list[Episode]:
    driver = driver_of(engine, source)
    return driver.finish(driver.resume(begun(driver), sampling))


def same(ours: list[Episode], reference: list[Episode], exact: bool = False) -> None:
    """Args:
    exact: log-probabilities are equal to the last bit, not to rounding only.
    """
    for one, other in zip(ours, reference, strict=True):
        assert [(turn.added, turn.new_segment, turn.sample.tokens) for turn in one.turns] == [
            (turn.added, turn.new_segment, turn.sample.tokens) for turn in other.turns
        ]
        assert repr(replace(one.end, episode=0)) == repr(replace(other.end, episode=0))  # the reward may be NaN
        for turn, turn_before in zip(one.turns, other.turns, strict=True):
            rounded = pytest.approx(turn_before.sample.logp, abs=2e-5)
            assert turn.sample.logp == (turn_before.sample.logp if exact else rounded)


def rows_of(engine: RolloutEngine, episodes: list[Episode]) -> Samples:
    return driver_of(engine, Scripted()).samples([one.task for one in episodes], episodes)


@pytest.mark.parametrize("segments", [False, True], ids=["one segment", "segments"])
def test_rows_hold_every_token_and_its_log_probability_is_transformers(loaded: Loaded, segments: bool) -> None:
    """Each segment read by transformers as it stands in the row."""
    model, engine, _ = loaded
    episodes = play(engine, Scripted(segments=segments))
    samples = rows_of(engine, episodes)
    assert samples.turn_BT is not None and samples.rollout_logp_BT is not None and samples.episodes is not None
    assert (samples.segment_BT is not None) == segments
    segment_BT = torch.zeros_like(samples.turn_BT) if samples.segment_BT is None else samples.segment_BT
    worst, seen = 0.0, set()
    for row, episode in enumerate(episodes):
        length = int(samples.length_B[row])
        assert samples.prompt_len_B[row] == len(episode.task.tokens)
        assert len(episode.turns) in (3, 4) and samples.episodes[row]["turns"] == len(episode.turns)
        assert int(samples.turn_BT[row].max()) == len(episode.turns)
        assert torch.equal(samples.mask_BT[row], samples.turn_BT[row] > 0)
        for segment in range(int(segment_BT[row, :length].max()) + 1):
            at = (segment_BT[row] == segment) & (torch.arange(segment_BT.shape[1]) < length)
            tokens = samples.tokens_BT[row, at].tolist()
            logp_T = tiny.log_probabilities(model, tokens[:1], tokens[1:], 0.9)
            sampled = samples.mask_BT[row, at][1:]
            assert not samples.mask_BT[row, at][0]
            worst = max(worst, float((logp_T - samples.rollout_logp_BT[row, at][1:])[sampled].abs().max()))
            seen.add(segment)
    assert worst < 1e-4
    assert seen == ({0, 1} if segments else {0})


def test_rewards_of_turns_and_of_failures(loaded: Loaded) -> None:
    _, engine, _ = loaded
    episodes = play(engine, Scripted())
    samples = rows_of(engine, episodes)
    kinds = [record["ended"] for record in samples.episodes or []]
    assert samples.episode_reward_B is not None and samples.turn_reward_BT is not None and samples.turn_BT is not None
    assert samples.episode_reward_B.isnan().tolist() == [kind == "crashed" for kind in kinds]
    for row, episode in enumerate(episodes):
        for number, turn in enumerate(episode.turns, 1):
            reward_T = samples.turn_reward_BT[row, samples.turn_BT[row] == number]
            share = sum(token % 2 == 0 for token in turn.sample.tokens) / len(turn.sample.tokens)
            assert reward_T[-1] == pytest.approx(share) and not reward_T[:-1].any()
        if not math.isnan(samples.episode_reward_B[row]):
            assert samples.episode_reward_B[row] == pytest.approx(samples.turn_reward_BT[row].sum())


def test_one_turn_is_a_response_of_generate(loaded: Loaded) -> None:
    _, engine, _ = loaded
    asked = tasks()
    seeds = [Place(1, 1, i, 0).turn_seed(1) for i in range(len(asked))]
    groups = engine.generate([list(task.tokens) for task in asked], seeds, SAMPLING, 2)
    episodes = play(engine, Scripted(turns=1))
    assert [one.turns[0].sample.tokens for one in episodes] == [one.tokens for group in groups for one in group]


@pytest.mark.parametrize("shuffle", [1, 2])
def test_the_order_of_answers_changes_no_token(loaded: Loaded, shuffle: int) -> None:
    _, engine, _ = loaded
    reference = play(engine, Scripted(segments=True))
    shuffled = play(engine, Scripted(segments=True, shuffle=shuffle, delay_s=(0.0, 0.01)))
    same(shuffled, reference, exact=isinstance(engine, VllmEngine))


@pytest.mark.parametrize("step_tokens", [1, 5, 11])
@pytest.mark.parametrize("restart", [False, True], ids=["goes on", "replayed"])
@pytest.mark.parametrize("places", [None, 3], ids=["", "few at once"])
def test_interrupted_episodes_go_on_as_if_they_had_not_been(
    loaded: Loaded, step_tokens: int, restart: bool, places: int | None
) -> None:
    """In the same process, and from what a checkpoint holds of them, in another one; also where the environments are too few for
    all of them at once."""
    _, engine, _ = loaded
    reference = play(engine, Scripted(segments=True))
    driver = driver_of(engine, Scripted(segments=True, shuffle=3, places=places))
    episodes, rounds = begun(driver), 0
    while not all(one.ended for one in episodes):
        before = [sum(len(turn.sample.tokens) for turn in one.turns) for one in episodes]
        left = iter(driver.finish(driver.resume([one for one in episodes if not one.ended], SAMPLING, step_tokens)))
        episodes = [one if one.ended else next(left) for one in episodes]
        for one, tokens in zip(episodes, before, strict=True):
            assert sum(len(turn.sample.tokens) for turn in one.turns) - tokens <= step_tokens
        engine.new_weights()  # as a sync would: nothing of the KV cache is left
        rounds += 1
        if restart and rounds % 2 == 0:
            saved = [driver.to_json(one) for one in episodes]
            driver = driver_of(engine, Scripted(segments=True, shuffle=rounds, places=places))
            episodes = [driver.from_json(one, episode.task) for one, episode in zip(saved, episodes, strict=True)]
    assert rounds >= 32 / step_tokens / 4
    same(episodes, reference)


def test_turns_at_once_are_sampled_together_and_stand_in_the_row_by_their_places(loaded: Loaded) -> None:
    model, engine, _ = loaded
    source = Forked(order=1)
    reference = play(engine, source)
    assert source.together > 1
    for order in (2, 3):
        same(play(engine, Forked(order)), reference, exact=isinstance(engine, VllmEngine))
    samples = rows_of(engine, reference)
    assert samples.segment_BT is not None and samples.turn_BT is not None and samples.rollout_logp_BT is not None
    for row, episode in enumerate(reference):
        # the first branch goes on from the first turn; each of the others, and the last turn, reads that anew
        news = [True, False, *([False] * (LENGTH - 1)), *([True, *[False] * (LENGTH - 1)] * (BRANCHES - 1)), True]
        assert [turn.new_segment for turn in episode.turns] == news
        for segment in range(BRANCHES + 1):
            at = (samples.segment_BT[row] == segment) & (
                torch.arange(samples.tokens_BT.shape[1]) < samples.length_B[row]
            )
            tokens = samples.tokens_BT[row, at].tolist()
            assert tuple(tokens[: len(episode.task.tokens)]) == episode.task.tokens
            logp_T = tiny.log_probabilities(model, tokens[:1], tokens[1:], 0.9)
            gap_T = (logp_T - samples.rollout_logp_BT[row, at][1:])[samples.mask_BT[row, at][1:]]
            assert float(gap_T.abs().max()) < 1e-4


@pytest.mark.parametrize("restart", [False, True], ids=["goes on", "replayed"])
def test_turns_at_once_go_on_after_an_interruption(loaded: Loaded, restart: bool) -> None:
    """Several turns of an episode are interrupted; the agent asks for them again in another order."""
    _, engine, _ = loaded
    reference = play(engine, Forked(order=1))
    driver = driver_of(engine, Forked(order=2))
    episodes, rounds, several = begun(driver), 0, 0
    shared = set[int]()  # seeds of turns that were asked for while others were open
    while not all(one.ended for one in episodes):
        left = iter(driver.finish(driver.resume([one for one in episodes if not one.ended], SAMPLING, 4)))
        episodes = [one if one.ended else next(left) for one in episodes]
        several += sum(sum(not turn.sample.ended for turn in one.turns) > 1 for one in episodes)
        turns = [turn for one in episodes for turn in one.turns]
        shared |= {turn.sample.seed for turn in turns if not turn.alone}
        assert not any(turn.alone for turn in turns if turn.sample.seed in shared), "a replay has forgotten it"
        engine.new_weights()
        rounds += 1
        if restart:
            saved = [driver.to_json(one) for one in episodes]
            driver = driver_of(engine, Forked(order=rounds + 7))
            episodes = [driver.from_json(one, episode.task) for one, episode in zip(saved, episodes, strict=True)]
    assert rounds > 3 and several > 3
    same(episodes, reference)


class Hasty:
    """Asks for two turns at once, goes on from the first, and needs the second no more: it ends once it has been paused, or both are over."""

    def __init__(self) -> None:
        self.events: list[Ask | Ended] = []
        self.over: dict[int, set[int]] = {}
        self.first: dict[int, tuple[int, ...]] = {}

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        assert episode not in self.over
        self.over[episode] = set()
        for turn, max_tokens in ((1, 2), (2, None)):
            self.events.append(Ask(episode, turn, (*task.tokens, turn), True, max_tokens, seed_key=turn))

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        events, self.events = self.events, []
        return events

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        self.over[episode].add(turn)
        if turn == 1:
            self.events.append(Ask(episode, 3, (*sample.prompt, *sample.tokens, 9), True, 2, seed_key=3))
        if self.over[episode] == {1, 2, 3}:
            self._end(episode)

    def pause(self, episode: int) -> None:
        self._end(episode)

    def _end(self, episode: int) -> None:
        turns = tuple(sorted(self.over[episode]))
        self.events.append(Ended(episode, float(len(turns)), (1.0,) * len(turns), "done", {}))

    def abandon(self, episodes: Collection[int]) -> None:
        raise AssertionError("nothing fails")

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


def test_an_episode_that_ends_while_it_is_interrupted_has_ended(loaded: Loaded) -> None:
    """It is not played again; and its row is the same wherever the turn stands that was not over."""
    _, engine, _ = loaded
    sampling, source = replace(SAMPLING, stop_token_ids=()), Hasty()
    driver = driver_of(engine, source)
    hasty, other = (driver.begin(task, Place(1, 1, i, 0)) for i, task in enumerate(tasks()[:2]))
    (one,) = driver.finish(driver.resume([hasty], sampling, 5))
    assert not one.ended and [turn.sample.ended for turn in one.turns] == [True, False, True]
    (whole,) = driver.finish(driver.resume([other], sampling))  # meanwhile the first one ends
    assert [turn.new_segment for turn in whole.turns] == [True, True, True]
    (one,) = driver.finish(driver.resume([one], sampling, 5))
    assert len(source.over) == 2 and one.end is not None and (one.end.reward, one.end.turn_rewards) == (2.0, (1.0, 1.0))
    assert [(turn.new_segment, len(turn.added), len(turn.sample.tokens)) for turn in one.turns] == [
        (True, len(one.task.tokens) + 1, 2), (False, 1, 2),
    ]  # fmt: skip
    assert not driver._ended_between and not engine.requests.under_way
    assert (
        driver.take_figures().answers == 3
    )  # both first turns of each together, and the end of one: else turns were open


def test_lower_limits_after_a_resume_end_turns_and_episodes(loaded: Loaded) -> None:
    """Turns that have more than the new sampling.max_tokens are cut off there; a source that ends an episode by a limit, before the
    recorded turns are over, has ended it."""
    _, engine, _ = loaded
    driver = driver_of(engine, Scripted())
    saved = [driver.to_json(one) for one in driver.finish(driver.resume(begun(driver), SAMPLING, 14))]
    other = driver_of(engine, Scripted(most_turns=2))
    left = [other.from_json(one, task) for one, task in zip(saved, [t for t in tasks() for _ in range(2)], strict=True)]
    left = [one for one in left if not one.ended]
    ended = other.finish(other.resume(left, replace(SAMPLING, max_tokens=2)))
    assert {one.end.ended for one in ended if one.end} == {"max_turns"}
    assert any(len(one.turns) > 2 for one in left), "none was beyond the limit"
    for one, before in zip(ended, left, strict=True):
        assert len(one.turns) == 2 and one.end is not None and not math.isnan(one.end.reward)
        for turn, known in zip(one.turns, before.turns, strict=False):
            assert turn.sample.tokens == known.sample.tokens
            assert turn.sample.ended and (known.sample.ended or turn.sample.truncated)


def test_an_environment_that_says_something_else_fails_the_replay(loaded: Loaded) -> None:
    _, engine, _ = loaded
    driver = driver_of(engine, Scripted())
    saved = [driver.to_json(one) for one in driver.finish(driver.resume(begun(driver), SAMPLING, 12))]
    other = driver_of(engine, Scripted(segments=True, turns=6))
    episodes = [
        other.from_json(one, task) for one, task in zip(saved, [t for t in tasks() for _ in range(2)], strict=True)
    ]
    episodes = [one for one in episodes if not one.ended]  # some are over within 12 tokens
    found = other.finish(other.resume(episodes, SAMPLING))
    ends = [one.end.ended for one in found if one.end is not None]
    assert "replay" in ends and all(
        math.isnan(one.end.reward) for one in found if one.end and one.end.ended == "replay"
    )


def test_a_raised_limit_does_not_fail_the_replay(loaded: Loaded) -> None:
    """Recorded turns stay as they were sampled; the next have the new limit."""
    _, engine, _ = loaded
    driver = driver_of(engine, Scripted(max_tokens=3))
    saved = [driver.to_json(one) for one in driver.finish(driver.resume(begun(driver), SAMPLING, 5))]
    numbers = [number for number, one in enumerate(saved) if one["end"] is None]
    other = driver_of(engine, Scripted(max_tokens=6))
    rest = [other.from_json(saved[number], tasks()[number // 2]) for number in numbers]
    assert any(one.turns for one in rest)
    for before, one in zip(rest, other.finish(other.resume(rest, SAMPLING)), strict=True):
        assert one.end is not None and one.end.ended in ("done", "crashed")
        assert [turn.sample.tokens for turn in before.turns[:-1]] == [
            turn.sample.tokens for turn in one.turns[: len(before.turns) - 1]
        ]


def test_an_environment_that_ends_sooner_than_before_fails_the_replay(loaded: Loaded) -> None:
    _, engine, _ = loaded
    driver = driver_of(engine, Scripted())
    saved = [driver.to_json(one) for one in driver.finish(driver.resume(begun(driver), SAMPLING, 12))]
    numbers = [number for number, one in enumerate(saved) if one["end"] is None and len(one["turns"]) > 2]
    assert numbers
    other = driver_of(engine, Scripted(turns=1))
    rest = [other.from_json(saved[number], tasks()[number // 2]) for number in numbers]
    for one in other.finish(other.resume(rest, SAMPLING)):
        assert one.end is not None and one.end.ended in ("replay", "crashed") and math.isnan(one.end.reward)
        if one.end.ended == "replay":
            assert "ends the episode after turn" in one.end.record["detail"]


def test_a_turn_reads_what_is_new_only(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's prefix cache keeps the turns before, but for the last, unfilled block."""
    _, engine, _ = loaded
    if not isinstance(engine, VllmEngine):
        pytest.skip("transformers' caches last as long as a turn")
    step, read = engine._llm.step, []

    def counted() -> Any:
        outputs = step()
        read.extend((len(one.prompt_token_ids), one.num_cached_tokens) for one in outputs if one.finished)
        return outputs

    monkeypatch.setattr(engine._llm, "step", counted)
    engine.new_weights()
    episodes = play(engine, Scripted(turns=10), replace(SAMPLING, max_tokens=4))
    assert len(read) == sum(len(one.turns) for one in episodes)
    assert max(length for length, _ in read) > 2 * BLOCK_TOKENS
    # the last sampled token has no cache yet, and the environment says at most 5
    assert all(cached >= length - 6 - (BLOCK_TOKENS - 1) for length, cached in read if length > BLOCK_TOKENS + 6)


def test_a_turn_may_have_limits_and_settings_of_its_own(loaded: Loaded) -> None:
    _, engine, _ = loaded
    episodes = play(engine, Scripted(max_tokens=3))
    assert max(len(turn.sample.tokens) for one in episodes for turn in one.turns) == 3
    assert any(turn.sample.truncated for one in episodes for turn in one.turns)


def test_a_context_that_leaves_no_room_ends_the_episode(loaded: Loaded) -> None:
    _, engine, _ = loaded
    source = Scripted(turns=40)
    episodes = play(engine, source, replace(SAMPLING, stop_token_ids=()))
    assert {one.end.ended for one in episodes if one.end is not None} == {"context"}
    assert all(one.row_tokens <= 96 for one in episodes)
    assert not source.plays


@pytest.mark.parametrize("call", ["poll", "answer"])
def test_an_error_of_the_source_ends_the_play(loaded: Loaded, call: str) -> None:
    _, engine, _ = loaded
    source = Scripted()
    source.fail_at = (call, 5)
    with pytest.raises(OSError, match="the environment's machine is gone"):
        play(engine, source)
    engine.requests.abort()


@pytest.mark.parametrize("lie", ["ids", "turn", "rewards"])
def test_a_source_that_breaks_the_protocol_is_named(loaded: Loaded, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine, _ = loaded
    source = Scripted()
    told: Callable[..., None] = source._say

    def lies(episode: int, event: Any) -> None:
        if lie == "rewards" and hasattr(event, "turn_rewards"):
            event = replace(event, turn_rewards=(*event.turn_rewards, 1.0))
        elif lie != "rewards" and getattr(event, "turn", 1) > 1:
            event = replace(event, turn=9) if lie == "turn" else replace(event, context=event.context[1:])
        told(episode, event)

    monkeypatch.setattr(source, "_say", lies)
    with pytest.raises(
        RuntimeError, match={"ids": "does not begin with", "turn": "turn 9", "rewards": "rewards for"}[lie]
    ):
        play(engine, source)
    engine.requests.abort()


def test_an_episode_that_ends_while_its_turn_is_sampled(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request leaves the engine; the others' tokens are what they would have been."""
    _, engine, _ = loaded
    reference = play(engine, Scripted())
    source = Scripted()
    polled = source.poll

    def poll(wait_s: float) -> list[Any]:
        if source.polls == 4:
            source.abandon([3])
            return [*polled(wait_s), Ended(3, math.nan, (), "episode_timeout", {})]
        return polled(wait_s)

    monkeypatch.setattr(source, "poll", poll)
    episodes = play(engine, source)
    assert episodes[2].end is not None and episodes[2].end.ended == "episode_timeout"
    same([*episodes[:2], *episodes[3:]], [*reference[:2], *reference[3:]])
    while engine.requests.under_way:
        with engine.working():
            engine.requests.advance()
