"""Build a preference data set from the model's own responses: per prompt, the best- and worst-scored of a group.

Nothing is trained. The output file is what data=preferences reads: prompt, chosen, rejected, their scores, and the
prompt's other fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor

from aligner.algorithms.sampling import scored_samples
from aligner.algorithms.step import Step
from aligner.bounds import AtLeast
from aligner.data.prompts import Prompt
from aligner.roles.build import Roles

if TYPE_CHECKING:
    from aligner.config.schema import Config


@dataclass(frozen=True)
class RankSamplesConfig:
    """Settings of `rank_samples`."""

    roles: list[str] = field(default_factory=lambda: ["policy", "rollout", "reward"])
    """Roles to build."""
    group_size: Annotated[int, AtLeast(2, "a single sample has nothing to be compared with")] = 8
    """Samples per prompt."""
    out: str = "preferences.jsonl"
    """JSONL file to write; a new run overwrites it."""

    def check_job(self, config: Config) -> None:
        """Raises ValueError for episodes: a pair is two responses to one prompt, and an episode's is only its last turn."""
        if config.environment.enabled:
            raise ValueError(
                "algorithm=rank_samples writes pairs of responses, and with environment.target samples are episodes; set "
                "environment.target='', or train on their rewards with algorithm=online_dpo."
            )

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if not Path(self.out).absolute().parent.is_dir():
            raise ValueError(
                f"algorithm.out={self.out}: the folder {Path(self.out).absolute().parent} does not exist; create it or "
                "choose another path."
            )


def rank_samples(roles: Roles, prompts: Iterable[list[Prompt]], cfg: RankSamplesConfig) -> Iterator[Step]:
    """Write one pair for each prompt whose responses' rewards differ; rows without a reward are ignored."""
    is_writer = roles.policy.world.rank == 0
    state = roles.keep(bytes=0)
    roles.policy.reshard_to(roles.rollout)
    if is_writer:
        truncate_output(Path(cfg.out), state.bytes)
    for batch in scored_samples(roles, prompts, cfg.group_size):
        fields, scores = batch.samples["fields"].gather(), batch.scores.gather()
        pairs = best_and_worst(scores.reward_B, scores.response, fields, cfg.group_size)
        if is_writer:
            with Path(cfg.out).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(pair) + "\n" for pair in pairs)
                state.bytes = file.tell()
        yield Step(None, batch.samples, batch.scores, {"pairs": float(len(pairs))})


def truncate_output(path: Path, size: int) -> None:
    """Truncate the output to its size at the checkpoint (0 for a new run): the lines after that are written again.

    Raises:
        ValueError: the file is shorter than the checkpoint says.
    """
    with path.open("ab") as file:
        if file.tell() < size:
            raise ValueError(
                f"algorithm.out={path} has {file.tell()} bytes, and had {size} when the checkpoint was made; bring the file "
                "back, or start anew with overwrite=true."
            )
        file.truncate(size)


def best_and_worst(
    reward_B: Tensor, response: Sequence[str], fields: Sequence[dict[str, Any]], group_size: int
) -> list[dict[str, Any]]:
    """One preference row per group whose rewards differ; among equal rewards the first row wins. Empty responses are left
    out."""
    pairs = []
    for start in range(0, len(reward_B), group_size):
        scored = [row for row in range(start, start + group_size) if not reward_B[row].isnan()]
        if not scored:
            continue
        best = max(scored, key=lambda row: (float(reward_B[row]), -row))
        worst = min(scored, key=lambda row: (float(reward_B[row]), row))
        if reward_B[best] > reward_B[worst] and response[best].strip() and response[worst].strip():
            pair = {"chosen": response[best], "rejected": response[worst]}
            pair_scores = {"score_chosen": float(reward_B[best]), "score_rejected": float(reward_B[worst])}
            pairs.append({**fields[start], **pair, **pair_scores})
    return pairs
