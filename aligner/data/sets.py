"""What a job trains and is evaluated on, read from its files or its generated task and tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aligner.data.answers import Answered
from aligner.data.chat import Notes, check_template_kwargs
from aligner.data.config import DataConfig
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.jsonl import LabelledRow, rows
from aligner.data.preferences import LeftOut, Pair, tokenize_feedback, tokenize_preferences
from aligner.data.prompts import Prompt, prompts_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = {
    "prompts": "prompt_rows",
    "demonstrations": "demonstration_rows",
    "preferences": "preference_rows",
    "feedback": "feedback_rows",
}
"""data.kind -> the method of a generated task that gives its rows."""
HELDOUT_METHODS = {
    "prompts": "heldout_rows",
    "demonstrations": "heldout_demonstration_rows",
    "preferences": "heldout_preference_rows",
    "feedback": "heldout_preference_rows",
}

ANSWER_FIELDS = ("chosen", "rejected", "response", "score", "score_chosen", "score_rejected", "margin")
"""Keys of a preference row that tell of its answers."""


@dataclass(frozen=True)
class DataSets:
    """All rows of a job, in the order of their source."""

    training: Sequence[Prompt] | Sequence[Answered] | Sequence[Pair]
    """Prompts; answers (of demonstrations or feedback); pairs."""
    heldout: list[Prompt] = field(default_factory=list)
    """Prompts to answer in evaluations; for preferences and feedback those of `heldout_pairs`, each once."""
    heldout_pairs: list[Pair] = field(default_factory=list)
    """Pairs to evaluate on (data.kind=preferences or feedback)."""
    heldout_answers: list[Answered] = field(default_factory=list)
    """Demonstrations to evaluate on (data.kind=demonstrations)."""
    left_out: LeftOut = field(default_factory=Counter)
    """Why training rows (or pairs) were left out -> how many."""
    heldout_left_out: LeftOut = field(default_factory=Counter)
    """The same of what is evaluated on."""
    notes: Notes = field(default_factory=Counter)
    """What else a reader should know of how the training rows were tokenized -> how many."""

    def metrics(self) -> dict[str, float]:
        """How many rows were left out, where some were: logged once, with the first step."""
        counts = {"data/left_out": self.left_out, "data/heldout_left_out": self.heldout_left_out}
        return {name: float(found.total()) for name, found in counts.items() if found.total()}

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer; 0 where there are none."""
        pairs = [row for row in (*self.training, *self.heldout_pairs) if isinstance(row, Pair)]
        answers = [row for row in (*self.training, *self.heldout_answers) if isinstance(row, Answered)]
        answers += [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        return max((len(answered.tokens) for answered in answers), default=0)


def read_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataSets:
    """Everything that `data` names.

    Raises:
        ValueError: a missing setting, a file or a row that cannot be used, or fewer rows than one step takes.
    """
    if data.task is None and not data.path:
        raise ValueError("data.path has no value; give a JSONL file, or choose a generated task: data=column_addition.")
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
    held = _task_rows(data, HELDOUT_METHODS) if data.task else rows(data.eval_path or "", "data.eval_path")
    more = data.chat_template_kwargs
    if data.kind == "prompts":
        prompts, dropped = prompts_that_fit(
            held, tokenizer, data.max_prompt_tokens, data.too_long, template_kwargs=more
        )
        return replace(sets, heldout=prompts[: data.eval_prompts], heldout_left_out=_too_long(dropped))
    if data.kind == "demonstrations":
        answers, dropped = tokenize_demonstrations(held, tokenizer, data.max_tokens, data.too_long, data.train_on, more)
        return replace(sets, heldout_answers=answers[: data.eval_prompts], heldout_left_out=_too_long(dropped))
    pairs, left_out = tokenize_preferences(held, tokenizer, data.max_tokens, data.too_long, more)
    pairs = pairs[: data.eval_prompts]
    return replace(sets, heldout=prompts_of(pairs, tokenizer), heldout_pairs=pairs, heldout_left_out=left_out)


def prompts_of(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The different prompts of pairs, in their order; their fields are the row's without the answers."""
    found: dict[tuple[int, ...], Prompt] = {}
    for pair in pairs:
        answered = pair.chosen
        tokens = answered.asked or answered.tokens[: answered.prompt_len]
        if tokens not in found:
            row = answered.fields
            written = row.get("prompt", row.get("query"))
            is_text = isinstance(written, str) and not isinstance(row.get("chosen"), list)
            text = str(written if is_text else tokenizer.decode(tokens))
            fields = {name: value for name, value in row.items() if name not in ANSWER_FIELDS}
            found[tokens] = Prompt(tokens, text, fields, len(found))
    return list(found.values())


def _training(data: DataConfig, source: Iterable[LabelledRow], tokenizer: PreTrainedTokenizerBase) -> DataSets:
    notes: Notes = Counter()
    more: dict[str, Any] = {"template_kwargs": data.chat_template_kwargs, "notes": notes}
    if data.kind == "prompts":
        prompts, dropped = prompts_that_fit(source, tokenizer, data.max_prompt_tokens, data.too_long, **more)
        return DataSets(prompts, left_out=_too_long(dropped), notes=notes)
    if data.kind == "demonstrations":
        kept, dropped = tokenize_demonstrations(
            source, tokenizer, data.max_tokens, data.too_long, data.train_on, **more
        )
        return DataSets(kept, left_out=_too_long(dropped), notes=notes)
    tokenize = tokenize_preferences if data.kind == "preferences" else tokenize_feedback
    found, left_out = tokenize(source, tokenizer, data.max_tokens, data.too_long, **more)
    return DataSets(found, left_out=left_out, notes=notes)


def _too_long(dropped: int) -> LeftOut:
    return Counter({"too long": dropped})


def _task_rows(data: DataConfig, methods: dict[str, str]) -> Iterable[LabelledRow]:
    method = getattr(data.task, methods[data.kind], None)
    if method is None:
        able = [kind for kind, name in methods.items() if hasattr(data.task, name)]
        raise ValueError(
            f"data.kind={data.kind} needs data.task to have {methods[data.kind]}(), and {type(data.task).__name__} has "
            f"none; use data.kind={' or '.join(able) or '...'} or data.path."
        )
    found: Iterable[LabelledRow] = method()
    return found
