"""Settings of the data sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.bounds import AtLeast, OneOf
from aligner.data.columns import Columns
from aligner.data.formats import FORMATS
from aligner.data.mapped import check_format
from aligner.data.mixture_config import CurriculumConfig, MixtureConfig

KINDS = ("prompts", "demonstrations", "preferences", "feedback")


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation data: files or a generated task."""

    path: Any = None
    """Training files: a file (.jsonl, .json, .csv, .tsv, those compressed; .parquet, .arrow), a folder of `save_to_disk` or of
    shards, a glob, a data set's name on a hub (HF_HUB_OFFLINE=0), or a list of these. Rows may have further fields. By
    `kind`: prompts: {"prompt"} or {"messages"}. Demonstrations: {"prompt", "completion"}, {"query", "response"} or
    {"messages"}. Preferences: {"prompt", "chosen", "rejected"} or {"query", "response": [...], "score": [...]}. Feedback:
    {"prompt", "completion", "label"} or preferences. Other columns: `columns`, `format`."""
    sources: dict[str, Any] = field(default_factory=dict)
    """Several training sources in place of data.path, by name: {path, weight, ...} (`SourceConfig` in
    aligner/data/mixture_config.py explains every setting; conf/data/mixture.yaml is an example)."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How rows are drawn from data.sources."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """In which order a source's rows come in an epoch."""
    eval_path: Any = None
    """Files, likewise, of held-out prompts (kind=prompts), demonstrations (evaluated by their loss) or preferences
    (kind=preferences or feedback; responses to their prompts are also generated and scored if the roles allow it); null:
    no evaluation."""
    split: str = "train"
    """Split of data.path, where it has several (a DatasetDict, shards such as train_sft-00000-of-00003.parquet, a hub)."""
    eval_split: str = "test"
    """Split of data.eval_path, likewise."""
    columns: Any = None
    """Columns by our keys, {prompt: question, answer: final.answer}, also nested (a.b, messages[0].content); columns that are
    not named stay as they are."""
    format: Annotated[str | None, OneOf(*FORMATS)] = None
    """Schema of a well-known data set, from which rows of `kind` are made (docs/data.md); null: rows have our keys."""
    chat: bool | None = None
    """Turn texts of prompts and answers into a user's and an assistant's turn, for the chat template; null: of a named
    `format`, if the tokenizer has a chat template."""
    task: Any = None
    """A generated task instead of files, as a `_target_` (see data=column_addition)."""
    kind: Annotated[str, OneOf(*KINDS)] = "prompts"
    """Kind of training rows: prompts (RL), demonstrations (SFT), preferences (chosen and rejected pairs) or feedback (responses
    labelled good or bad)."""
    prompts_per_step: Annotated[int, AtLeast(1)] = 32
    """Batch size of one step: prompts, demonstrations, preference pairs, or labelled responses."""
    train_on: Annotated[str, OneOf("responses", "all")] = "responses"
    """Demonstrations: loss on `responses`, or on `all` tokens but the first. An assistant message with "train": false
    (or "weight": 0) is masked in both."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template for all conversations, such as enable_thinking; a row's own
    'chat_template_kwargs' take precedence."""
    system_prompt: str | None = None
    """System prompt of every conversation, in place of the row's own; '' for none, null: as each row has it."""
    chat_template: str | None = None
    """File of a chat template (jinja) to use in place of the tokenizer's; exports carry it."""
    max_prompt_tokens: Annotated[int, AtLeast(1)] = 512
    """Longest prompt allowed for generation, in tokens."""
    max_tokens: Annotated[int, AtLeast(2)] = 1024
    """Longest prompt plus answer allowed, in tokens."""
    too_long: Annotated[str, OneOf("error", "drop", "stop")] = "error"
    """What to do with prompts longer than max_prompt_tokens and with demonstrations, pairs and answers longer than max_tokens
    (also held-out ones): error (or its synonym stop), or drop, which logs their number."""
    on_error: Annotated[str, OneOf("stop", "skip")] = "stop"
    """What to do with a row that cannot be read or used (broken JSON, a missing column, an empty answer): stop with its file,
    line and column, or skip it, which counts it (data/left_out) and shows the first ones."""
    streaming: bool | None = None
    """Read and tokenize rows when their turn comes, ahead of the step, instead of all before the job starts; null: for sets
    of more than 200,000 rows."""
    shuffle: bool = True
    """Reshuffle in each epoch."""
    eval_prompts: Annotated[int, AtLeast(1)] = 256
    """Most held-out prompts (or demonstrations, or pairs) used in an evaluation."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.train_on == "all" and self.kind != "demonstrations":
            raise ValueError(f"data.train_on=all is for data.kind=demonstrations, not {self.kind}; use responses.")
        if self.curriculum.by == "success" and self.kind != "prompts":
            raise ValueError(
                f"data.curriculum.by=success measures how often prompts are solved, and data.kind={self.kind} has no samples to "
                "measure; use by=column, or none."
            )
        if self.curriculum.by != "none" and self.mixture.replacement:
            raise ValueError(
                "data.mixture.replacement=true draws rows at random, so data.curriculum.by="
                f"{self.curriculum.by} has no order to follow; use by=none, or replacement=false."
            )
        check_format(self.format, self.kind)
        if self.columns is not None:
            Columns(self.columns)
        for setting, path in (("path", self.path), ("eval_path", self.eval_path)):
            parts = path if isinstance(path, (list, tuple)) else [path]
            if not all(part is None or isinstance(part, str) for part in parts):
                raise ValueError(f"data.{setting}={path} must be a path, or a list of paths.")
