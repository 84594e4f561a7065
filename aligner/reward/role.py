"""The reward role: each member rank scores its rows; values of the global batch are combined to rewards on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from aligner.data.decoding import decode
from aligner.data.samples import Samples
from aligner.health.rank_status import excerpt
from aligner.reward.combine import combine, reward_row
from aligner.reward.components import ResolvedComponent, Scorer, reward_components
from aligner.reward.config import RewardConfig
from aligner.reward.missing import MissingScores, check_missing, missing_of
from aligner.reward.worker import Score, Status
from aligner.spmd.mesh import Mesh
from aligner.spmd.messages import all_gather
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rewards:
    """Rewards of a batch, with the raw values and statuses of the components."""

    reward_B: Tensor
    """float32; NaN for rows without a reward, which are never scored 0."""
    status_B: Tensor
    """int8 `Status`: the worst among the components that the row needs."""
    response: list[str]
    """The text that was scored."""
    components: dict[str, Tensor]
    """Raw values by component: [B] float32, NaN where missing."""
    component_status: dict[str, Tensor]
    """int8 `Status` by component: [B]."""

    def row(self) -> dict[str, float]:
        """Metrics of the batch; see `reward_row`."""
        kinds = [status.name.lower() for status in Status]
        return reward_row(self.reward_B, self.status_B, self.components, self.component_status, kinds)


class RowScorer(Protocol):
    """A reward model: a role with a scalar head."""

    def scores(self, samples: Ref) -> Ref:
        """Ref to [B] float32, lined up with the samples. Every rank of the world calls it."""
        ...


class Reward(Role):
    """Rules, endpoints and reward models, alone or in a weighted sum."""

    def __init__(
        self,
        name: str,
        world: World,
        mesh: Mesh,
        config: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        models: Mapping[str, RowScorer] | None = None,
    ) -> None:
        """
        Args:
            models: the reward models by role name, which score the components that name them.

        Raises:
            ValueError: a component that cannot be computed.
        """
        super().__init__(name, world, mesh)
        self.config, self.tokenizer = config, tokenizer
        self.parts = reward_components(config)
        self.models: dict[str, RowScorer] = {}
        for part in self.parts:
            if part.model is not None:
                if part.model not in (models or {}):
                    raise ValueError(f"{part.source} needs the role {part.model}; add {part.model} to algorithm.roles.")
                self.models[part.model] = (models or {})[part.model]
        self.scorers: dict[str, Scorer] = {}
        self.keeps_scored = False
        """Whether `take_scored` is wanted."""
        self._calls = 0
        self._scored: dict[tuple[int, int], tuple[int, float]] = {}
        if self.member:
            for part in self.parts:
                scorer = part.scorer()
                if scorer is not None:
                    scorer.progress = world.activity.tick
                    self.scorers[part.name] = scorer
                    world.on_leave(scorer.close)

    def score(self, samples: Ref) -> Ref:
        """Score every row. Collective over the world.

        Returns:
            Ref to `Rewards`.

        Raises:
            ValueError: more rows without a score than reward.max_missing allows, or none has one; examples are shown.
        """
        from_models = {name: model.scores(samples) for name, model in self.models.items()}  # role calls: every rank's
        with self.call("score"):
            local = self.localize((samples,), from_models)
            value = self._score(local.args[0], local.kwargs, local.row_numbers) if self.member else None
            self._calls += 1
            if self.keeps_scored and value is not None:
                self._keep_scored(local.args[0], value.reward_B, local.row_numbers)
            return Ref(self, value, local.rows)

    def take_scored(self) -> dict[tuple[int, int], tuple[int, float]]:
        """What this rank has scored since the last time: (number of the call, row of its batch) -> (the prompt's index, its
        reward), without rows that have no reward. Ranks that share rows have the same entries."""
        scored, self._scored = self._scored, {}
        return scored

    def _keep_scored(self, samples: Samples, reward_B: Tensor, rows: Sequence[int]) -> None:
        for row, index, reward in zip(rows, samples.prompt_index_B.tolist(), reward_B.tolist(), strict=True):
            if not math.isnan(reward):
                self._scored[self._calls, row] = (index, reward)

    def _score(self, samples: Samples, from_models: Mapping[str, Tensor], rows: Sequence[int]) -> Rewards:
        """Args:
        from_models: [B] of each reward model, by role name.
        """
        ids = [samples.last_turn_tokens(row) for row in range(samples.rows)]
        rows_fields, failed = samples.fields, failed_episodes(samples)
        if samples.episodes is not None:
            # rules see the whole of it: its messages, how it ended, its environment's metrics
            rows_fields = [
                {**fields, "episode": episode} for fields, episode in zip(samples.fields, samples.episodes, strict=True)
            ]
        texts: dict[bool, list[str]] = {}
        items: dict[bool, list[dict[str, Any]]] = {}
        for kept in {self.config.keep_special_tokens, *(part.keep_special_tokens for part in self.parts)}:
            texts[kept] = [decode(self.tokenizer, row, kept) for row in ids]
            items[kept] = [
                {"prompt": str(fields.get("prompt", "")), "response": text, "fields": fields}
                for row, (text, fields) in enumerate(zip(texts[kept], rows_fields, strict=True))
                if row not in failed
            ]
        rows_of_items = [number for row, number in enumerate(rows) if row not in failed]
        self.world.activity.details["reward"] = lambda: self._being_scored(items, rows_of_items)
        scores = self._by_part(items, from_models, samples, failed)
        self.world.activity.details.pop("reward")
        raw = {name: _raw(of_part) for name, of_part in scores.items()}
        status = {name: torch.tensor([int(s.status) for s in of], dtype=torch.int8) for name, of in scores.items()}
        reward_B, status_B = self._combined(rows, raw, status, {name: missing_of(of) for name, of in scores.items()})
        return Rewards(reward_B, status_B, texts[self.config.keep_special_tokens], raw, status)

    def _being_scored(self, items: Mapping[bool, Sequence[Mapping[str, Any]]], rows: Sequence[int]) -> list[str]:
        """For a report: rows that workers have, and endpoints have not answered."""
        either = items[self.config.keep_special_tokens]
        return [
            f"{name}, row {rows[i] if i < len(rows) else '?'}: prompt {excerpt(either[i]['prompt'])}, response "
            f"{excerpt(either[i]['response'])}"
            for name, scorer in self.scorers.items()
            for i in scorer.under_way()
        ]

    def _by_part(
        self,
        items: Mapping[bool, Sequence[Mapping[str, Any]]],
        from_models: Mapping[str, Tensor],
        samples: Samples,
        failed: Mapping[int, Score],
    ) -> dict[str, list[Score]]:
        """Scores by component; the components are scored concurrently. An episode that failed has none of any component.

        Args:
            items: the rows without those that failed, by whether their responses have special tokens.
            failed: the scores of rows whose episodes failed.
        """
        with ThreadPoolExecutor(max(1, len(self.scorers))) as threads:
            running = {
                part.name: threads.submit(self.scorers[part.name].score, items[part.keep_special_tokens])
                for part in self.parts
                if part.name in self.scorers
            }

            def scores_of(part: ResolvedComponent) -> list[Score]:
                if part.name in running:
                    of_others = iter(running[part.name].result())
                    return [failed[row] if row in failed else next(of_others) for row in range(samples.rows)]
                if part.model is not None:
                    of_rows = _of_model(from_models[part.model])
                    return [failed.get(row, score) for row, score in enumerate(of_rows)]
                return of_environment(samples, part.source, failed)

            return {part.name: scores_of(part) for part in self.parts}

    def _combined(
        self, rows: Sequence[int], raw: dict[str, Tensor], status: dict[str, Tensor], missing: dict[str, MissingScores]
    ) -> tuple[Tensor, Tensor]:
        """This shard's (reward_B, status_B): every rank combines the global batch in its global row order, so that the
        result does not depend on the sharding, bit for bit."""
        shards = all_gather(self.world, (tuple(rows), raw, status, missing), self.mesh.ranks)
        locations = sorted(
            {row: (n, i) for n, (shard_rows, *_) in enumerate(shards) for i, row in enumerate(shard_rows)}.items()
        )
        starts = [0, *accumulate(len(shard_rows) for shard_rows, *_ in shards)]
        order = torch.tensor([starts[n] + i for _, (n, i) in locations], dtype=torch.long)
        all_raw, all_status = (
            {part.name: torch.cat([shard[field][part.name] for shard in shards])[order] for part in self.parts}
            for field in (1, 2)
        )
        reward_B, status_B = combine(all_raw, all_status, {part.name: part.component for part in self.parts})
        by_source = {part.source: MissingScores() for part in self.parts}
        for shard in {shard_rows[0]: missing for shard_rows, _, _, missing in shards if shard_rows}.values():
            for part in self.parts:
                by_source[part.source].update(shard[part.name])
        check_missing(status_B.tolist(), by_source, self.config.max_missing)
        position_of = {row: position for position, (row, _) in enumerate(locations)}
        own_positions = torch.tensor([position_of[row] for row in rows], dtype=torch.long)
        return reward_B[own_positions], status_B[own_positions]


def _raw(scores: Sequence[Score]) -> Tensor:
    return torch.tensor([s.value if s.status is Status.OK else math.nan for s in scores], dtype=torch.float32)


def failed_episodes(samples: Samples) -> dict[int, Score]:
    """The rows whose episodes failed, with how they ended."""
    if samples.episode_reward_B is None or samples.episodes is None:
        return {}
    ends = zip(samples.episode_reward_B.tolist(), samples.episodes, strict=True)
    return {
        row: Score(math.nan, Status.FAILED, 0.0, f"the episode ended as {record['ended']} {record['detail']}".rstrip())
        for row, (reward, record) in enumerate(ends)
        if not math.isfinite(reward)
    }


def of_environment(samples: Samples, source: str, failed: Mapping[int, Score]) -> list[Score]:
    """The rewards of episodes; of one that failed, what `failed` has.

    Raises:
        ValueError: the samples are no episodes.
    """
    if samples.episode_reward_B is None:
        raise ValueError(f"{source} reads the rewards of episodes, and these samples are none; set environment.target.")
    rewards = samples.episode_reward_B.tolist()
    return [failed[row] if row in failed else Score(reward, Status.OK, 0.0) for row, reward in enumerate(rewards)]


def _of_model(score_B: Tensor) -> list[Score]:
    return [
        Score(value, Status.OK, 0.0)
        if math.isfinite(value)
        else Score(math.nan, Status.FAILED, 0.0, f"the reward model returned {value}")
        for value in score_B.tolist()
    ]
