"""Preferences from a model's own answers: sample a group for each prompt, keep its best and its worst as a pair.

Nothing is trained. What is written is what data=preferences reads: prompt, chosen, rejected, their scores, and the
prompt's other fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.bounds import AtLeast
from aligner.data.prompts import Prompt
from aligner.roles.build import Roles


@dataclass(frozen=True)
class RankSamplesConfig:
    """How many answers are compared, and where the pairs go."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reward"])
    """Roles to build."""
    group_size: Annotated[int, AtLeast(2, "a single sample has nothing to be compared with")] = 8
    """Samples per prompt."""
    out: str = "preferences.jsonl"
    """The JSONL file to write, anew."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if not Path(self.out).absolute().parent.is_dir():
            raise ValueError(f"algorithm.out={self.out} is in no folder that there is; make it, or choose another.")


def rank_samples(roles: Roles, prompts: Iterable[list[Prompt]], cfg: RankSamplesConfig) -> Iterator[Step]:
    """A pair for each prompt whose answers' rewards differ; rows without a reward are in no pair."""
    writes = roles.policy.world.rank == 0
    kept = roles.keep(bytes=0)
    roles.policy.reshard_to(roles.rollout)
    if writes:
        begin(Path(cfg.out), kept.bytes)
    for batch in scored_samples(roles, prompts, cfg.group_size):
        fields, scores = batch.samples["fields"].gather(), batch.scores.gather()
        pairs = best_and_worst(scores.reward_B, scores.response, fields, cfg.group_size)
        if writes:
            with Path(cfg.out).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(pair) + "\n" for pair in pairs)
                kept.bytes = file.tell()
        yield Step(None, batch.samples, batch.scores, {"pairs": float(len(pairs))})


def begin(out: Path, known: int) -> None:
    """Anew, or after what a checkpoint knows: later lines will come again."""
    with out.open("ab") as file:
        if file.tell() < known:
            raise ValueError(
                f"algorithm.out={out} has {file.tell()} bytes, and had {known} when the checkpoint was made; bring the file "
                "back, or start anew with overwrite=true."
            )
        file.truncate(known)


def best_and_worst(
    reward_B: Tensor, response: Sequence[str], fields: Sequence[dict[str, Any]], group_size: int
) -> list[dict[str, Any]]:
    """A preference row for each group whose rewards differ; of equal rewards the first counts."""
    pairs = []
    for start in range(0, len(reward_B), group_size):
        scored = [row for row in range(start, start + group_size) if not reward_B[row].isnan()]
        if not scored:
            continue
        best = max(scored, key=lambda row: (float(reward_B[row]), -row))
        worst = min(scored, key=lambda row: (float(reward_B[row]), row))
        if reward_B[best] > reward_B[worst] and response[best].strip() and response[worst].strip():
            pair = {"chosen": response[best], "rejected": response[worst]}
            told = {"score_chosen": float(reward_B[best]), "score_rejected": float(reward_B[worst])}
            pairs.append({**fields[start], **pair, **told})
    return pairs
