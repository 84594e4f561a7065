"""Settings of several training sources: their weights, how they are mixed, and in which order their rows come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from aligner.bounds import Between, Finite, MoreThan, OneOf

ORDERS = {"column": ("ascending", "descending"), "success": ("easiest", "hardest", "uncertain")}
"""data.curriculum.by -> the orders that it has, the usual one first."""


@dataclass(frozen=True)
class SourceConfig:
    """One entry of data.sources. What it leaves out is as `data` has it for all sources."""

    path: Any = None
    """Its rows, as data.path."""
    weight: float = 1.0
    """Its share of the rows (or, with data.mixture.batches=single, of the batches), relative to the others'."""
    split: str | None = None
    """Its split; null: data.split."""
    columns: Any = None
    """Its columns by our keys; null: data.columns."""
    format: str | None = None
    """Its schema (docs/data.md); null: data.format."""
    chat: bool | None = None
    """Whether its texts become turns of a conversation; null: data.chat."""
    system_prompt: str | None = None
    """System prompt of its conversations; null: data.system_prompt."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template in its conversations, over those of data.chat_template_kwargs."""
    streaming: bool | None = None
    """Whether it is read when its turn comes; null: data.streaming."""


@dataclass(frozen=True)
class MixtureConfig:
    """How rows are drawn from several sources (data.sources)."""

    batches: Annotated[str, OneOf("mixed", "single")] = "mixed"
    """mixed: each row of a batch is from a source of its own, drawn by weight; single: a batch is from one source, drawn by
    weight."""
    exhausted: Annotated[str, OneOf("repeat", "first", "all")] = "repeat"
    """When every row of a source was drawn. repeat: its next epoch begins, so that weights hold throughout. first: all sources
    begin a new epoch when the first is exhausted. all: it is left out until all are, so that an epoch has each row once."""
    replacement: bool = False
    """Draw rows of a source with replacement: uniformly at random, without epochs."""
    temperature: Annotated[float | None, MoreThan(0)] = None
    """Weights are multiplied by (number of rows) ** (1 / temperature): 1 draws by size, higher values favour small sources;
    null: sizes do not count."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.replacement and self.exhausted != "repeat":
            raise ValueError(
                f"data.mixture.exhausted={self.exhausted}: with data.mixture.replacement=true no source is ever exhausted; use "
                "repeat."
            )


@dataclass(frozen=True)
class CurriculumConfig:
    """In which order a source's rows come in an epoch."""

    by: Annotated[str, OneOf("none", *ORDERS)] = "none"
    """none: as data.shuffle says; column: by a number in each row; success: by the measured success of a prompt, the share of
    its samples with a reward of success_reward or more (data.kind=prompts)."""
    column: str | None = None
    """by=column: the field of a row."""
    order: Annotated[str | None, OneOf(*(order for orders in ORDERS.values() for order in orders))] = None
    """by=column: ascending (default) or descending. by=success: easiest (default) or hardest first, or uncertain: the highest
    p (1 - p) first. Ties are in the order of data.shuffle."""
    fraction: Annotated[float, MoreThan(0), Between(0, 1)] = 1.0
    """Fraction of the ordered rows, from the first, that an epoch has."""
    success_reward: Annotated[float, Finite()] = 0.5
    """A sample with this reward or more is a success."""
    memory: Annotated[float, Between(0, 1)] = 0.5
    """Weight of a prompt's earlier samples beside those of its last step: 0 forgets them, 1 counts all alike."""
    retire_at: Annotated[float | None, MoreThan(0), Between(0, 1)] = None
    """by=success: prompts of this success rate or more are left out of the next epochs; null: none. When none are left, all
    come back for an epoch."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.by == "none" and (self.column or self.order or self.fraction != 1 or self.retire_at):
            raise ValueError(
                "data.curriculum has settings, but by=none orders nothing; set data.curriculum.by=column or success."
            )
        if self.by != "none" and self.order not in (None, *ORDERS[self.by]):
            raise ValueError(
                f"data.curriculum.order={self.order} is not an order by {self.by}; use {' or '.join(ORDERS[self.by])}."
            )
        if (self.by == "column") != (self.column is not None):
            hint = "needs the name of a field of the rows" if self.by == "column" else "is for by=column; remove it"
            raise ValueError(f"data.curriculum.column={self.column} {hint}.")
        if self.by != "success" and self.retire_at is not None:
            raise ValueError(f"data.curriculum.retire_at={self.retire_at} is for by=success; use null.")
