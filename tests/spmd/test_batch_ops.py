"""Rows of batches with episodes: taken, joined, cut; a field that only some parts have."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from aligner.data.samples import Samples, pad_rows
from aligner.spmd import batch_ops
from aligner.spmd.serialization import deserialize, serialize


def episodes(*rows: list[int], segments: list[list[int]] | None = None) -> Samples:
    """Rows of tokens; those of 10 and more were sampled, in turns of one token each."""
    tokens_BT = pad_rows(rows, torch.long)
    mask_BT = tokens_BT >= 10
    return Samples(
        tokens_BT=tokens_BT,
        prompt_len_B=torch.ones(len(rows), dtype=torch.long),
        length_B=torch.tensor([len(row) for row in rows]),
        mask_BT=mask_BT,
        prompt_index_B=torch.arange(len(rows)),
        fields=[{"answer": row[-1]} for row in rows],
        rollout_logp_BT=torch.where(mask_BT, -0.5, 0.0),
        truncated_B=torch.zeros(len(rows), dtype=torch.bool),
        version_BT=mask_BT.int(),
        turn_BT=(mask_BT.cumsum(1) * mask_BT).int(),
        segment_BT=None if segments is None else pad_rows(segments, torch.int32),
        turn_reward_BT=torch.where(mask_BT, 0.25, 0.0),
        episode_reward_B=torch.tensor([0.5 * len(row) for row in rows]),
        episodes=[{"ended": "done", "turns": len(row)} for row in rows],
    )


def assert_same(one: Samples, other: Samples) -> None:
    for name in (field.name for field in fields(Samples)):
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0, msg=name)
        else:
            assert left == right, name


WHOLE = episodes([1, 10, 2, 11], [1, 12], [3, 13, 14], segments=[[0, 0, 1, 1], [0, 0], [0, 0, 0]])


@pytest.mark.parametrize("cut", [1, 2])
def test_parts_joined_are_the_whole(cut: int) -> None:
    parts = [batch_ops.take(WHOLE, range(cut)), batch_ops.take(WHOLE, range(cut, 3))]
    parts = [batch_ops.fit_width(part, int(part.length_B.max())) for part in parts]
    assert_same(batch_ops.join(parts), WHOLE)


def test_every_field_of_an_episode_is_serialized() -> None:
    assert_same(deserialize(serialize(WHOLE)), WHOLE)


@pytest.mark.parametrize("first", [False, True])
def test_a_part_without_segments_has_one(first: bool) -> None:
    """Each shard knows only its own rows: that all of them are one segment says nothing of the other shards'."""
    one, other = batch_ops.take(WHOLE, [0]), replace(batch_ops.take(WHOLE, [1, 2]), segment_BT=None)
    joined = batch_ops.join([other, one] if first else [one, other])
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]] if first else [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert joined.segment_BT.tolist() == expected and joined.segment_BT.dtype == torch.int32


@pytest.mark.parametrize("first", [False, True])
def test_segments_are_as_wide_as_the_tokens(first: bool) -> None:
    """Where the widest part is one without segments."""
    short, wide = batch_ops.take(WHOLE, [0]), episodes([1, 10, 2, 11, 3, 12, 4])
    joined = batch_ops.join([wide, short] if first else [short, wide])
    assert joined.segment_BT.shape == joined.tokens_BT.shape == (2, 7)
    assert joined.segment_BT[int(first)].tolist() == [0, 0, 1, 1, 0, 0, 0]


def test_no_part_with_segments_has_none() -> None:
    one = replace(batch_ops.take(WHOLE, [0]), segment_BT=None)
    assert batch_ops.join([one, one]).segment_BT is None


@pytest.mark.parametrize("name", ["turn_reward_BT", "episode_reward_B", "rollout_logp_BT", "episodes"])
def test_a_missing_value_is_not_made_up(name: str) -> None:
    missing: dict[str, Any] = {name: None}
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        batch_ops.join([replace(WHOLE, **missing), WHOLE])
