"""What is kept of a batch, row by row, by hand: turns and segments of an episode; a response is one turn."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from aligner.reward.pool import Status
from aligner.reward.role import Rewards
from aligner.run.saved_samples import records_of
from tests.trainer.episodes import Episode, as_samples

SAMPLES = replace(
    as_samples(
        [
            Episode([([1, 2], 0), ([10], 1), ([4], 0), ([11, 12], 2), ([1], 0), ([13], 3)], frozenset({4})),
            Episode([([1, 2], 0), ([20, 21], 1), ([6], 0)]),
        ],
        torch.tensor([[0, 0, -1, 0, -2, -3, 0, -4], [0, 0, -5, -6, 0, 0, 0, 0.0]]),
    ),
    version_BT=torch.tensor([[0, 0, 3, 0, 3, 4, 0, 4], [0, 0, 4, 4, 0, 0, 0, 0]], dtype=torch.int32),
    turn_reward_BT=torch.tensor([[0, 0, 0, 0, 0, 0.5, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0.0]]),
    episode_reward_B=torch.tensor([1.5, math.nan]),
    truncated_B=torch.tensor([False, True]),
    episodes=[{"ended": "done"}, {"ended": "timeout"}],
)
STATUS = torch.tensor([int(Status.OK), int(Status.FAILED)], dtype=torch.int8)
REWARD_B = torch.tensor([2.0, math.nan])
SCORES = Rewards(REWARD_B, STATUS, ["x", "y"], {"rule": REWARD_B}, {"rule": STATUS})


def test_episodes_by_hand() -> None:
    first, second = records_of(SAMPLES, SCORES)
    assert first.tokens == [1, 2, 10, 4, 11, 12, 1, 13] and first.prompt_tokens == 2 and first.segments == [0, 6]
    assert [(turn.number, turn.start, turn.stop, turn.reward) for turn in first.turns] == [
        (1, 2, 3, 0.0), (2, 4, 6, 0.5), (3, 7, 8, 1.0),
    ]  # fmt: skip
    assert [turn.logp for turn in first.turns] == [[-1], [-2, -3], [-4]]
    assert [turn.versions for turn in first.turns] == [[3], [3, 4], [4]]
    assert (first.reward, first.status, first.episode_reward, first.episode) == (2.0, "ok", 1.5, {"ended": "done"})
    assert second.tokens == [1, 2, 20, 21, 6] and second.segments == [0] and second.truncated
    assert [(turn.start, turn.stop) for turn in second.turns] == [(2, 4)] and second.status == "failed"
    assert second.reward is not None and math.isnan(second.reward), "null in the file"


def test_a_response_is_one_turn() -> None:
    plain = replace(
        SAMPLES, turn_BT=None, segment_BT=None, turn_reward_BT=None, episode_reward_B=None, episodes=None,
        rollout_logp_BT=None, version_BT=None, truncated_B=None,
    )  # fmt: skip
    first, _ = records_of(plain, SCORES)
    (turn,) = first.turns
    assert (turn.number, turn.start, turn.stop, turn.logp, turn.versions, turn.reward) == (1, 2, 8, [], [], None)
    assert first.segments == [0] and first.episode is None and first.truncated is None


def test_an_episode_that_failed_before_its_first_turn_has_none() -> None:
    (record,) = records_of(
        replace(as_samples([Episode([([1, 2], 0)])]), episodes=[{"ended": "crashed"}]),
        Rewards(REWARD_B[1:], STATUS[1:], [""], {}, {}),
    )
    assert record.turns == [] and record.tokens == [1, 2]


def test_lengths_are_those_of_what_was_sampled() -> None:
    assert SAMPLES.response_len_B.tolist() == [4, 2]
    assert replace(SAMPLES, turn_BT=None).response_len_B.tolist() == [6, 3]
