"""The reward role: every member rank scores its rows by a rule in its own worker processes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.data.samples import Samples
from aligner.reward.config import RewardConfig
from aligner.reward.pool import RulePool, Score, Status
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """What became of each row."""

    reward_B: Tensor
    """float32; NaN where there is no score: never a silent zero."""
    status_B: Tensor
    """int8 `Status`."""
    response: list[str]
    """The text that was scored."""


class Reward(Role):
    """Rule rewards."""

    def __init__(
        self, name: str, world: World, mesh: Mesh, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__(name, world, mesh)
        self.config, self.tokenizer = config, tokenizer
        if self.member:
            self.pool = RulePool(config.rule, config.kwargs, config.workers, config.timeout_s)
            world.on_leave(self.pool.close)

    def score(self, samples: Ref) -> Ref:
        """Score every row.

        Returns:
            Ref to `Scores`.

        Raises:
            ValueError: more rows without a score than reward.max_missing allows; one of them is shown.
        """
        with self.call("score"):
            local = self.localize((samples,), {})
            value = self._score(local.args[0]) if self.member else None
            return Ref(self, value, local.rows)

    def _score(self, samples: Samples) -> Scores:
        texts = [
            self.tokenizer.decode(samples.response_tokens(row), skip_special_tokens=True) for row in range(samples.rows)
        ]
        items = [
            {"prompt": str(fields.get("prompt", "")), "response": text, "fields": fields}
            for text, fields in zip(texts, samples.fields, strict=True)
        ]
        scores = self.pool.score(items)
        self._check_missing(scores)
        return Scores(
            torch.tensor([score.value if score.status is Status.OK else math.nan for score in scores]),
            torch.tensor([int(score.status) for score in scores], dtype=torch.int8),
            texts,
        )

    def _check_missing(self, scores: list[Score]) -> None:
        """Counts of the whole batch, so that every rank decides alike."""
        missing = [score for score in scores if score.status is not Status.OK]
        example = f"{missing[0].status.name.lower()}: {missing[0].detail}" if missing else ""
        found: list[Any] = [None] * self.mesh.size
        kinds = Counter(score.status.name.lower() for score in missing)
        dist.all_gather_object(found, (len(scores), kinds, example), group=self.group)
        rows = sum(count for count, _, _ in found)
        lost: Counter[str] = sum((kinds for _, kinds, _ in found), Counter())
        if rows and lost.total() > self.config.max_missing * rows:
            raise ValueError(
                f"{lost.total()} of {rows} rows have no reward ({', '.join(f'{n} {k}' for k, n in lost.items())}), more "
                f"than reward.max_missing={self.config.max_missing}. reward.rule={self.config.rule} said, for one row: "
                + next(text for _, _, text in found if text)
            )
