"""Read and tokenize a job's training and evaluation data, from files or a generated task."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aligner.data.chat import ChatOptions, Notes, check_template_kwargs
from aligner.data.config import DataConfig
from aligner.data.demonstrations import DemonstrationTokenizer
from aligner.data.digest import digest
from aligner.data.left_out import LeftOut
from aligner.data.mapped import MappedRows
from aligner.data.named_sources import ALONE, NamedSource, named_sources
from aligner.data.preferences import FeedbackTokenizer, Pair, PreferenceTokenizer
from aligner.data.prompts import Prompt, PromptTokenizer
from aligner.data.row_tokenizer import RowErrors, RowTokenizer, tokenize_source
from aligner.data.sources.open import open_source
from aligner.data.sources.source import RowList, RowSource
from aligner.data.streamed import StreamedExamples
from aligner.data.tokenized_answer import TokenizedAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = {
    "prompts": "prompt_rows",
    "demonstrations": "demonstration_rows",
    "preferences": "preference_rows",
    "feedback": "feedback_rows",
}
"""data.kind -> method of a generated task that returns its training rows."""
HELDOUT_METHODS = {
    "prompts": "heldout_rows",
    "demonstrations": "heldout_demonstration_rows",
    "preferences": "heldout_preference_rows",
    "feedback": "heldout_preference_rows",
}

STREAMED_ROWS = 200_000
"""Sets of more rows are streamed, unless data.streaming says otherwise."""
ANSWER_FIELDS = ("chosen", "rejected", "response", "score", "score_chosen", "score_rejected", "margin")
"""Keys of a preference row that belong to its answers, not to its prompt."""


Examples = Sequence[Prompt] | Sequence[TokenizedAnswer] | Sequence[Pair] | StreamedExamples[Any]
"""Prompts, answers (demonstrations or feedback), or pairs, by data.kind; or where they come from, if they are streamed."""


@dataclass(frozen=True)
class MixedExamples:
    """The rows of several sources (data.sources); their `index` counts on from one source to the next."""

    parts: Mapping[str, Examples]
    """By the name of the source."""
    weights: Mapping[str, float]
    """The weight of each source."""

    def __len__(self) -> int:
        """Rows of all sources."""
        return sum(len(part) for part in self.parts.values())


@dataclass(frozen=True)
class DataSets:
    """The tokenized rows of a job, in file order."""

    training: Examples | MixedExamples
    """Of data.path or data.task, or of several sources."""
    heldout: list[Prompt] = field(default_factory=list)
    """Evaluation prompts to generate from; for preferences and feedback the distinct prompts of `heldout_pairs`."""
    heldout_pairs: list[Pair] = field(default_factory=list)
    """Evaluation pairs (data.kind=preferences or feedback)."""
    heldout_answers: list[TokenizedAnswer] = field(default_factory=list)
    """Evaluation demonstrations (data.kind=demonstrations)."""
    left_out: LeftOut = field(default_factory=Counter)
    """Reason why training rows (or pairs) were left out -> number."""
    heldout_left_out: LeftOut = field(default_factory=Counter)
    """The same for the evaluation rows."""
    notes: Notes = field(default_factory=Counter)
    """Remark on how training rows were tokenized -> number."""
    wrong: list[str] = field(default_factory=list)
    """The errors of the first rows that data.on_error=skip left out."""

    @property
    def parts(self) -> Mapping[str, Examples]:
        """The training rows by the name of their source; that of a job with one is ALONE."""
        return self.training.parts if isinstance(self.training, MixedExamples) else {ALONE: self.training}

    @property
    def known(self) -> Sequence[Any]:
        """The training rows that are tokenized before the job starts: all, or the first of a set that is streamed."""
        return [row for part in self.parts.values() for row in known_rows(part)]

    def metrics(self) -> dict[str, float]:
        """Numbers of rows left out, if any; logged once, with the first step."""
        counts = {"data/left_out": self.left_out, "data/heldout_left_out": self.heldout_left_out}
        return {name: float(reasons.total()) for name, reasons in counts.items() if reasons.total()}

    def training_digests(self) -> dict[str, str]:
        """Source -> identity of its rows: of their tokens and fields, or of the files of a streamed set."""
        return {
            name: part.source.digest() if isinstance(part, StreamedExamples) else digest(part)
            for name, part in self.parts.items()
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus answer; 0 if there are no answers. Of a streamed set what is allowed."""
        pairs = [row for row in (*self.known, *self.heldout_pairs) if isinstance(row, Pair)]
        answers = [row for row in (*self.known, *self.heldout_answers) if isinstance(row, TokenizedAnswer)]
        answers += [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        lengths = [len(answered.tokens) for answered in answers]
        if lengths:
            lengths += [part.longest for part in self.parts.values() if isinstance(part, StreamedExamples)]
        return max(lengths, default=0)


def read_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataSets:
    """Read and tokenize what `data` configures: all rows, or the first ones of a set that is streamed.

    Raises:
        ValueError: a missing setting, an unusable file or row, or fewer rows than one batch.
    """
    sets = _all_training(data, tokenizer)
    count = len(sets.training)
    if data.prompts_per_step > count:
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} is more than the {count} rows of "
            f"{', '.join(training_sources(data))}; use {count} or less, or give more rows."
        )
    heldout = open_heldout(data, tokenizer)
    return sets if heldout is None else _with_heldout(sets, data, heldout, tokenizer)


def training_sources(data: DataConfig) -> dict[str, NamedSource]:
    """What errors call a training source -> the source.

    Raises:
        ValueError: see `named_sources`.
    """
    return {
        "data.task" if source.data.task else f"{source.setting}={source.data.path}": source
        for source in named_sources(data)
    }


def open_training(source: NamedSource, tokenizer: PreTrainedTokenizerBase) -> RowSource:
    """The rows of a training source. Raises ValueError: they cannot be read, or there are none."""
    if source.data.task:
        return _task_rows(source.data, METHODS)
    return _file_rows(source.data, tokenizer, source.setting)


def open_heldout(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> RowSource | None:
    """The held-out rows; None if there are none. Raises ValueError: they cannot be read."""
    if data.task:
        return _task_rows(data, HELDOUT_METHODS)
    return _file_rows(data, tokenizer, "data.eval_path") if data.eval_path else None


def _all_training(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataSets:
    """The training rows of every source, and what is to be said of them."""
    named = list(training_sources(data).values())
    read: dict[str, DataSets] = {}
    first = 0
    for source in named:
        where = "data" if source.name == ALONE else f"data.sources.{source.name}"
        check_template_kwargs(tokenizer, source.data.chat_template_kwargs, f"{where}.chat_template_kwargs.")
        read[source.name] = _training(source.data, open_training(source, tokenizer), tokenizer, first)
        first += len(read[source.name].training)
        _check_order(source, read[source.name])
    if not data.sources:
        return read[ALONE]
    parts: dict[str, Any] = {name: sets.training for name, sets in read.items()}
    return DataSets(
        MixedExamples(parts, {source.name: source.weight for source in named}),
        left_out=sum((sets.left_out for sets in read.values()), Counter()),
        notes=sum((sets.notes for sets in read.values()), Counter()),
        wrong=[error for sets in read.values() for error in sets.wrong],
    )


def _check_order(source: NamedSource, sets: DataSets) -> None:
    """Raises ValueError for an order that a streamed set does not have."""
    mixture, curriculum = source.data.mixture, source.data.curriculum
    settings = {
        f"data.curriculum.by={curriculum.by}": curriculum.by != "none",
        f"data.mixture.exhausted={mixture.exhausted}": mixture.exhausted != "repeat",
        "data.mixture.replacement=true": mixture.replacement,
    }
    given = next((setting for setting, set_here in settings.items() if set_here), None)
    if given and isinstance(sets.training, StreamedExamples):
        raise ValueError(
            f"{given} needs all rows in memory, and {source.setting}={source.data.path} ({len(sets.training)} rows) is streamed; "
            "set data.streaming=false, or leave the other setting as it is by default."
        )


def known_rows(part: Examples) -> Sequence[Any]:
    """The rows of one source that are tokenized before the job starts."""
    return part.sample if isinstance(part, StreamedExamples) else part


def _training(data: DataConfig, source: RowSource, tokenizer: PreTrainedTokenizerBase, first: int) -> DataSets:
    """Args:
    first: `index` of the first row.
    """
    notes: Notes = Counter()
    tokenize, errors = row_tokenizer(data, tokenizer, notes), RowErrors(data.on_error)
    if is_streamed(data, source):
        # The stream's thread has a tokenizer of its own: a fast one does not serve two threads at once.
        own = row_tokenizer(data, copy.deepcopy(tokenizer), Counter())
        bound = data.max_prompt_tokens if data.kind == "prompts" else data.max_tokens
        streamed: StreamedExamples[Any] = StreamedExamples(source, own, errors, bound, first)
        streamed.read_sample()
        return DataSets(streamed, wrong=errors.first)
    examples = tokenize_source(source, tokenize, errors, first)
    return DataSets(examples, left_out=+tokenize.left_out, notes=notes, wrong=errors.first)


def _with_heldout(sets: DataSets, data: DataConfig, source: RowSource, tokenizer: PreTrainedTokenizerBase) -> DataSets:
    tokenize = row_tokenizer(data, tokenizer, heldout=True)
    errors = RowErrors(data.on_error)
    examples = tokenize_source(source, tokenize, errors)[: data.eval_prompts]
    sets = replace(sets, heldout_left_out=+tokenize.left_out, wrong=[*sets.wrong, *errors.first])
    if data.kind == "prompts":
        return replace(sets, heldout=examples)
    if data.kind == "demonstrations":
        return replace(sets, heldout_answers=examples)
    return replace(sets, heldout=prompts_of(examples, tokenizer), heldout_pairs=examples)


def is_streamed(data: DataConfig, source: RowSource) -> bool:
    """Whether rows are tokenized when their turn comes (data.streaming; null: sets of more than STREAMED_ROWS rows)."""
    return len(source) > STREAMED_ROWS if data.streaming is None else data.streaming


def row_tokenizer(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, notes: Notes | None = None, heldout: bool = False
) -> RowTokenizer[Any]:
    """The tokenizer of rows of data.kind.

    Args:
        notes: counter of things to report about how rows were tokenized.
        heldout: of data.eval_path: preferences, where training rows are feedback.
    """
    options: dict[str, Any] = {"chat": ChatOptions(data.chat_template_kwargs, data.system_prompt), "notes": notes}
    if data.kind == "prompts":
        return PromptTokenizer(tokenizer, data.max_prompt_tokens, data.too_long, **options)
    if data.kind == "demonstrations":
        return DemonstrationTokenizer(tokenizer, data.max_tokens, data.too_long, data.train_on, **options)
    kind = FeedbackTokenizer if data.kind == "feedback" and not heldout else PreferenceTokenizer
    return kind(tokenizer, data.max_tokens, data.too_long, **options)


def prompts_of(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The distinct prompts of pairs, in order; their fields are the row's without ANSWER_FIELDS."""
    prompts: dict[tuple[int, ...], Prompt] = {}
    for pair in pairs:
        answered = pair.chosen
        tokens = answered.asked or answered.tokens[: answered.prompt_len]
        if tokens not in prompts:
            row = answered.fields
            written = row.get("prompt", row.get("query"))
            is_text = isinstance(written, str) and not isinstance(row.get("chosen"), list)
            text = str(written if is_text else tokenizer.decode(tokens))
            fields = {name: value for name, value in row.items() if name not in ANSWER_FIELDS}
            prompts[tokens] = Prompt(tokens, text, fields, len(prompts))
    return list(prompts.values())


def _file_rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase, setting: str) -> RowSource:
    """The rows of data.path, of a source's path or of data.eval_path (`setting`), with the keys that data.kind wants."""
    held, section = setting == "data.eval_path", setting.rpartition(".")[0]
    split, split_setting = (data.eval_split, "data.eval_split") if held else (data.split, f"{section}.split")
    source = open_source(data.eval_path if held else data.path, setting, split, split_setting)
    chat = data.chat if data.chat is not None else data.format is not None and bool(tokenizer.chat_template)
    kind = "preferences" if held and data.kind == "feedback" else data.kind
    return MappedRows(source, data.columns, data.format, kind, chat)


def _task_rows(data: DataConfig, methods: dict[str, str]) -> RowSource:
    method = getattr(data.task, methods[data.kind], None)
    if method is None:
        available = [kind for kind, name in methods.items() if hasattr(data.task, name)]
        raise ValueError(
            f"data.kind={data.kind} needs data.task to have {methods[data.kind]}(), and {type(data.task).__name__} has "
            f"none; use data.kind={' or '.join(available) or '...'} or data.path."
        )
    return RowList("data.task", method())
