"""A saved episode played again: nothing differs in the same environment, and what does is named where it begins."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from aligner.data.prompts import Prompt
from aligner.report.sample_records import RecordedTurn, SampleRecord
from aligner.reward.role import Rewards
from aligner.rollout.episodes.episode import Episode, Turn, in_order
from aligner.rollout.episodes.replay import replay
from aligner.rollout.episodes.rows import episode_samples
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.kind import Place
from aligner.rollout.requests import Sample
from aligner.run.saved_samples import records_of
from tests.rollout.episodes.forked import Forked
from tests.rollout.episodes.scripted import Scripted, digest

TASK, SEED, STOP = Prompt((3, 4, 5), "345", {"prompt": "345"}, 8), 77, {2}


def played(source: Scripted) -> SampleRecord:
    """An episode as the rollout records it; what is sampled is a function of the context, and ends with a stop token."""
    source.start(1, TASK, SEED)
    tokens: list[int] = []
    turns: list[RecordedTurn] = []
    segments, known = [0], 0
    while True:
        (event,) = source.poll(0.1)
        if isinstance(event, Ended):
            break
        assert isinstance(event, Ask)
        if event.new_segment and tokens:
            segments.append(len(tokens))
            known = 0
        tokens += event.context[known:]
        sampled = [3 + digest(event.context, i) % 90 for i in range(3)] + [2]
        source.answer(1, event.turn, Sample(list(event.context), 0, sampled, [-0.5] * 4, [1] * 4, ended=True))
        turns.append(RecordedTurn(event.turn, len(tokens), len(tokens) + 4, [-0.5] * 4, [1] * 4))
        tokens += sampled
        known = len(event.context) + 4
    rewards = event.turn_rewards
    turns = [replace(turn, reward=reward) for turn, reward in zip(turns, rewards, strict=True)]
    failed = math.isnan(event.reward)
    return SampleRecord(
        row=0, prompt_index=TASK.index, fields=TASK.fields, tokens=tokens, prompt_tokens=3, turns=turns,
        segments=segments, truncated=False, reward=None if failed else event.reward,
        status="failed" if failed else "ok", episode_reward=None if failed else event.reward,
        episode={"ended": event.ended, "detail": "", "seed": SEED, "messages": [], "metrics": {}},
    )  # fmt: skip


def forked(order: int) -> SampleRecord:
    """An episode of several turns at once, as the rollout records it."""
    source, turns, ended = Forked(order), list[Turn](), None
    source.start(1, TASK, SEED)
    known: list[int] = []
    while ended is None:
        for event in source.poll(0.1):
            if isinstance(event, Ended):
                ended = event
                continue
            added = event.context if event.new_segment else event.context[len(known) :]
            sampled = [3 + digest(event.context, i) % 90 for i in range(3)] + [2]
            sample = Sample(list(event.context), 0, sampled, [-0.5] * 4, [1] * 4, ended=True)
            source.answer(1, event.turn, sample)
            turns.append(Turn(tuple(added), event.new_segment, sample))
            known = [*event.context, *sampled]
    episode = Episode(TASK, Place(0, 0, 0, 0), in_order(turns, ended.order), replace(ended, order=()))
    reward_B = torch.tensor([ended.reward])
    (record,) = records_of(episode_samples([episode]), Rewards(reward_B, torch.zeros(1), [], {}, {}))
    return replace(record, episode={**(record.episode or {}), "seed": SEED})


def test_turns_at_once_are_answered_in_whichever_order_they_are_asked_for() -> None:
    record = forked(1)
    assert len(record.turns) == 2 + 3 * 2
    for order in (1, 2, 3):
        assert [str(one) for one in replay(Forked(order), record, STOP, 5.0)] == []


def again(record: SampleRecord, source: Scripted) -> list[str]:
    return [f"{one.where}: {one.what}" for one in replay(source, record, STOP, 5.0)]


@pytest.mark.parametrize("settings", [{}, {"segments": True, "turns": 6}, {"turns": 1}])
def test_the_same_environment_does_it_all_again(settings: dict[str, Any]) -> None:
    record = played(Scripted(**settings))
    assert len(record.segments) == (3 if settings.get("segments") else 1) or len(record.segments) == 2
    assert again(record, Scripted(**settings)) == []


def test_another_answer_is_named_at_the_turn_that_follows_it() -> None:
    record = played(Scripted(turns=4))
    assert again(record, Scripted(turns=4, vocab=20)) == ["turn 2: the context"]
    assert again(replace(record, episode={**record.episode, "seed": SEED + 1}), Scripted(turns=4)) == [
        "turn 2: the context"
    ]


def test_an_episode_that_goes_on_or_stops_elsewhere() -> None:
    record = played(Scripted(turns=4))
    assert again(record, Scripted(turns=6)) == ["end: another turn is asked for"]
    assert again(record, Scripted(turns=2))[0].endswith("the episode has ended")


def test_other_rewards_and_endings_are_named() -> None:
    record = played(Scripted(turns=3))
    assert record.episode_reward is not None, "of this seed the episode does not fail"
    first = replace(record.turns[0], reward=0.125)
    assert again(replace(record, turns=[first, *record.turns[1:]]), Scripted(turns=3)) == ["end: the turns' rewards"]
    assert again(replace(record, episode_reward=9.0), Scripted(turns=3)) == ["end: the reward"]
    other = {**record.episode, "ended": "max_turns"}
    assert again(replace(record, episode=other), Scripted(turns=3)) == ["end: how it ended"]
    assert again(replace(record, episode={**other, "ended": "context"}), Scripted(turns=3)) == [], (
        "the rollout ended it"
    )


def test_a_response_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0 is a response, not an episode"):
        replay(Scripted(), replace(played(Scripted()), episode=None), STOP, 1.0)


def test_a_silent_environment_is_not_waited_for_without_end() -> None:
    record = played(Scripted())
    with pytest.raises(ValueError, match=r"has said nothing for 0\.05 s"):
        replay(Scripted(delay_s=(30.0, 30.0)), record, STOP, 0.05)


class Watched(Scripted):
    """Asks with a stop token of its own, and keeps what it is told of each turn's end."""

    truncated: ClassVar[list[bool]] = []

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        asks = super().poll(wait_s)
        return [replace(one, sampling={"stop_token_ids": [95]}) if isinstance(one, Ask) else one for one in asks]

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        self.truncated.append(sample.truncated)
        super().answer(episode, turn, sample)


def test_a_turn_ends_with_the_stop_token_that_its_agent_asked_for() -> None:
    record = played(Scripted(turns=1))
    tokens = [95 if place == record.turns[-1].stop - 1 else token for place, token in enumerate(record.tokens)]
    again(replace(record, tokens=tokens), Watched(turns=1))
    assert Watched.truncated == [False]


def test_an_episode_that_fails_while_it_waits_for_its_turn() -> None:
    class Failing(Scripted):
        def poll(self, wait_s: float) -> list[Ask | Ended]:
            asks = super().poll(wait_s)
            self.abandon([1])
            return [*asks, Ended(1, math.nan, (), "timeout", {"detail": "too late"})]

    (difference,) = replay(Failing(), played(Scripted()), STOP, 5.0)
    assert difference.where == "turn 1" and difference.now == "timeout (too late)"
