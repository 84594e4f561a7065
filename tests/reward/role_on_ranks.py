"""What ranks do in the reward role's tests: they score a batch."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from aligner.data.samples import Samples, pad_rows
from aligner.reward.config import RewardConfig
from aligner.reward.role import Reward
from aligner.run.step_stats import StepStats, merged
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import all_gather
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World


class Head(Role):
    """Stands where the reward model does: a role on ranks of its own, whose score is a function of the tokens."""

    def scores(self, samples: Ref) -> Ref:
        """[B] float32; NaN for every row of 7 tokens. Another name is another function."""
        factor = 1000 if self.name == "reward_model" else 10

        def score(held: Samples) -> torch.Tensor:
            mean_B = held.tokens_BT.float().sum(1) / held.length_B
            return torch.where(held.length_B == 7, torch.nan, torch.sin(mean_B * factor))

        return self.map(score, samples)


def batch(responses: list[str], tokenizer: Any) -> Samples:
    """One prompt of 2 tokens before each response."""
    rows = [[1, 1, *tokenizer.encode(text, add_special_tokens=False).ids] for text in responses]
    length_B = torch.tensor([len(row) for row in rows])
    return Samples(
        tokens_BT=pad_rows(rows, torch.long),
        prompt_len_B=torch.full((len(rows),), 2),
        length_B=length_B,
        mask_BT=torch.arange(int(length_B.max()))[None] < length_B[:, None],
        prompt_index_B=torch.arange(len(rows)) // 2,
        fields=[{"prompt": "p", "row": row} for row in range(len(rows))],
    )


def as_episodes(samples: Samples, rewards: list[float]) -> Samples:
    """The last token of each row is its second turn, the one before was not sampled."""
    position_BT = torch.arange(samples.tokens_BT.shape[1])[None] - samples.length_B[:, None]
    mask_BT = samples.mask_BT & (position_BT != -2) & (torch.arange(samples.tokens_BT.shape[1]) >= 2)
    return replace(
        samples,
        mask_BT=mask_BT,
        turn_BT=mask_BT.int() * (1 + (position_BT == -1).int()),
        episode_reward_B=torch.tensor(rewards),
        episodes=[{"ended": "timeout", "detail": "a step", "turns": 2, "row": row} for row in range(samples.rows)],
    )


def score(world: World, tokenizer_file: Path, name: str, case: dict[str, Any]) -> dict[str, Any] | str:
    """What came of a case {reward, responses, ranks}, or its error; NaN and all the rest to the last bit."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    heads = {
        "reward_model": Head("reward_model", world, Mesh((world.size - 1,))),
        "taste": Head("taste", world, Mesh(tuple(range(world.size)))),
    }
    mesh = Mesh(tuple(case["ranks"]))
    source = Role(f"source_{name}", world, mesh)
    reward = Reward(f"reward_{name}", world, mesh, RewardConfig(**case["reward"]), tokenizer, heads)
    reward.keeps_scored = True
    try:
        samples = batch(case["responses"], tokenizer)
        if "episode_rewards" in case:
            samples = as_episodes(samples, case["episode_rewards"])
        scores = reward.score(source.scatter(samples, group_size=2)).gather()
    except ValueError as error:
        return str(error)
    of_ranks = all_gather(world, StepStats(scored=reward.take_scored()), range(world.size))
    rewards = reduce(merged, of_ranks).rewards()
    assert not reward.take_scored(), "they are taken once"
    return {
        "by_prompt": {prompt: [value.hex() for value in values] for prompt, values in rewards.items()},
        "reward": [value.hex() for value in scores.reward_B.tolist()],
        "status": scores.status_B.tolist(),
        "response": scores.response,
        "components": {name: value_B.tolist() for name, value_B in scores.components.items()},
        "row": scores.row(),
    }
