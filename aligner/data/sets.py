"""Read and tokenize a job's training and evaluation data, from files or a generated task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aligner.data.chat import ChatOptions, Notes, check_template_kwargs
from aligner.data.config import DataConfig
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.jsonl import LabelledRow, rows
from aligner.data.preferences import LeftOut, Pair, tokenize_feedback, tokenize_preferences
from aligner.data.prompts import Prompt, prompts_that_fit
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

ANSWER_FIELDS = ("chosen", "rejected", "response", "score", "score_chosen", "score_rejected", "margin")
"""Keys of a preference row that belong to its answers, not to its prompt."""


@dataclass(frozen=True)
class DataSets:
    """The tokenized rows of a job, in file order."""

    training: Sequence[Prompt] | Sequence[TokenizedAnswer] | Sequence[Pair]
    """Prompts, answers (demonstrations or feedback), or pairs, by data.kind."""
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

    def metrics(self) -> dict[str, float]:
        """Numbers of rows left out, if any; logged once, with the first step."""
        counts = {"data/left_out": self.left_out, "data/heldout_left_out": self.heldout_left_out}
        return {name: float(reasons.total()) for name, reasons in counts.items() if reasons.total()}

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus answer; 0 if there are no answers."""
        pairs = [row for row in (*self.training, *self.heldout_pairs) if isinstance(row, Pair)]
        answers = [row for row in (*self.training, *self.heldout_answers) if isinstance(row, TokenizedAnswer)]
        answers += [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        return max((len(answered.tokens) for answered in answers), default=0)


def read_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataSets:
    """Read and tokenize all rows that `data` configures.

    Raises:
        ValueError: a missing setting, an unusable file or row, or fewer rows than one batch.
    """
    if data.task is None and not data.path:
        raise ValueError("data.path is not set; give a JSONL file, or choose a generated task: data=column_addition.")
    check_template_kwargs(tokenizer, data.chat_template_kwargs)
    source = _task_rows(data, METHODS) if data.task else rows(data.path or "")
    sets = _training(data, source, tokenizer)
    count = len(sets.training)
    if data.prompts_per_step > count:
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} is more than the {count} rows of "
            f"{'data.task' if data.task else f'data.path={data.path}'}; use {count} or less, or give more rows."
        )
    if not (data.task or data.eval_path):
        return sets
    heldout_rows = _task_rows(data, HELDOUT_METHODS) if data.task else rows(data.eval_path or "", "data.eval_path")
    chat = _chat(data)
    if data.kind == "prompts":
        prompts, dropped = prompts_that_fit(heldout_rows, tokenizer, data.max_prompt_tokens, data.too_long, chat=chat)
        return replace(sets, heldout=prompts[: data.eval_prompts], heldout_left_out=_too_long(dropped))
    if data.kind == "demonstrations":
        answers, dropped = tokenize_demonstrations(
            heldout_rows, tokenizer, data.max_tokens, data.too_long, data.train_on, chat
        )
        return replace(sets, heldout_answers=answers[: data.eval_prompts], heldout_left_out=_too_long(dropped))
    pairs, left_out = tokenize_preferences(heldout_rows, tokenizer, data.max_tokens, data.too_long, chat)
    pairs = pairs[: data.eval_prompts]
    return replace(sets, heldout=prompts_of(pairs, tokenizer), heldout_pairs=pairs, heldout_left_out=left_out)


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


def _training(data: DataConfig, source: Iterable[LabelledRow], tokenizer: PreTrainedTokenizerBase) -> DataSets:
    notes: Notes = Counter()
    options: dict[str, Any] = {"chat": _chat(data), "notes": notes}
    if data.kind == "prompts":
        prompts, dropped = prompts_that_fit(source, tokenizer, data.max_prompt_tokens, data.too_long, **options)
        return DataSets(prompts, left_out=_too_long(dropped), notes=notes)
    if data.kind == "demonstrations":
        demonstrations, dropped = tokenize_demonstrations(
            source, tokenizer, data.max_tokens, data.too_long, data.train_on, **options
        )
        return DataSets(demonstrations, left_out=_too_long(dropped), notes=notes)
    tokenize = tokenize_preferences if data.kind == "preferences" else tokenize_feedback
    examples, left_out = tokenize(source, tokenizer, data.max_tokens, data.too_long, **options)
    return DataSets(examples, left_out=left_out, notes=notes)


def _chat(data: DataConfig) -> ChatOptions:
    return ChatOptions(data.chat_template_kwargs, data.system_prompt)


def _too_long(dropped: int) -> LeftOut:
    return Counter({"too long": dropped})


def _task_rows(data: DataConfig, methods: dict[str, str]) -> Iterable[LabelledRow]:
    method = getattr(data.task, methods[data.kind], None)
    if method is None:
        available = [kind for kind, name in methods.items() if hasattr(data.task, name)]
        raise ValueError(
            f"data.kind={data.kind} needs data.task to have {methods[data.kind]}(), and {type(data.task).__name__} has "
            f"none; use data.kind={' or '.join(available) or '...'} or data.path."
        )
    task_rows: Iterable[LabelledRow] = method()
    return task_rows
