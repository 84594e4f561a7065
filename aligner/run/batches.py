"""The batches that a loop iterates over: the same on every rank, without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from aligner.check.job import Checked
from aligner.config.schema import Config
from aligner.data.curriculum import CurriculumStream
from aligner.data.mixture import MixedSource, Mixture, SourceStream, source_seed
from aligner.data.preferences import Pair
from aligner.data.samples import Demonstrations, Feedback, Pairs, Samples, pad_rows
from aligner.data.sets import Examples, MixedExamples
from aligner.data.stream import RowStream
from aligner.data.streamed import ExampleStream, StreamedExamples
from aligner.data.tokenized_answer import TokenizedAnswer


def training_rows(config: Config, checked: Checked, digests: Mapping[str, str] | None = None) -> Mixture:
    """The job's training rows in the order of the run, with the position in them.

    Args:
        digests: of each source's rows, by its name, if already computed.
    """
    data = checked.data
    weights = data.training.weights if isinstance(data.training, MixedExamples) else {}
    sources: list[MixedSource] = []
    first = 0
    for name, rows in data.parts.items():
        stream = _stream(config, name, rows, len(data.parts) > 1, (digests or {}).get(name))
        sources.append(MixedSource(name, stream, first, len(rows), weights.get(name, 1.0)))
        first += len(rows)
    return Mixture(sources, config.data.mixture, config.seed, config.data.curriculum.success_reward)


def _stream(config: Config, name: str, rows: Examples, mixed: bool, digest: str | None) -> SourceStream:
    """One source's rows: as they are read, in the order of a curriculum, or in epochs."""
    data, seed = config.data, source_seed(config.seed, name, mixed)
    if isinstance(rows, StreamedExamples):
        return ExampleStream(rows, seed, data.shuffle, data.prompts_per_step, digest)
    if data.curriculum.by != "none":
        where = f"data.sources.{name}" if mixed else "data.path"
        return CurriculumStream(rows, data.curriculum, seed, data.shuffle, digest, where)
    return RowStream(rows, seed, data.shuffle, digest, data.mixture.replacement)


def batches(config: Config, rows: Mixture) -> Iterator[Any]:
    """Batches in the form of data.kind, without end: how many a step takes is the loop's choice."""
    form = FORMS[config.data.kind]
    while True:
        yield form(rows.take(config.data.prompts_per_step))


def answers_as_samples(answers: Sequence[TokenizedAnswer]) -> Samples:
    """Answers with their prompts as rows, trained on where their masks say."""
    return Samples(
        tokens_BT=pad_rows([a.tokens for a in answers], torch.long),
        prompt_len_B=torch.tensor([a.prompt_len for a in answers]),
        length_B=torch.tensor([len(a.tokens) for a in answers]),
        mask_BT=pad_rows([a.mask for a in answers], torch.bool),
        prompt_index_B=torch.tensor([a.index for a in answers]),
        fields=[a.fields for a in answers],
    )


def as_demonstrations(answers: Sequence[TokenizedAnswer]) -> Demonstrations:
    """One row for each demonstration."""
    return Demonstrations(answers_as_samples(answers))


def as_pairs(pairs: Sequence[Pair]) -> Pairs:
    """Two rows for each pair: chosen, rejected."""
    return Pairs(answers_as_samples([side for pair in pairs for side in (pair.chosen, pair.rejected)]))


def as_feedback(answers: Sequence[TokenizedAnswer]) -> Feedback:
    """One row for each answer, with its 'label' in its fields."""
    return Feedback(answers_as_samples(answers))


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "prompts": list,
    "demonstrations": as_demonstrations,
    "preferences": as_pairs,
    "feedback": as_feedback,
}
"""data.kind -> the batch that rows become."""
