"""The batches that a loop iterates over: the same on every rank, one per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from aligner.check import Checked
from aligner.config import Config
from aligner.data.demonstrations import Demonstration, DemonstrationStream
from aligner.data.prompts import PromptStream
from aligner.data.samples import Samples, pad_rows
from aligner.spmd.journal import Journal


def batches(config: Config, checked: Checked, journal: Journal) -> Iterator[Any]:
    """`train.steps` batches; the journal learns which step the loop is in."""
    data = config.data
    if data.kind == "prompts":
        prompts = PromptStream(checked.prompts, data.prompts_per_step, config.seed, data.shuffle)
    else:
        demonstrations = DemonstrationStream(checked.demonstrations, config.seed, data.shuffle)
    for step in range(config.train.steps):
        journal.step = step + 1
        yield prompts.next() if data.kind == "prompts" else as_samples(demonstrations.next(data.prompts_per_step))


def as_samples(demonstrations: Sequence[Demonstration]) -> Samples:
    """Demonstrations as rows, trained on where their masks say."""
    return Samples(
        tokens_BT=pad_rows([d.tokens for d in demonstrations], torch.long),
        prompt_len_B=torch.tensor([d.prompt_len for d in demonstrations]),
        length_B=torch.tensor([len(d.tokens) for d in demonstrations]),
        mask_BT=pad_rows([d.mask for d in demonstrations], torch.bool),
        prompt_index_B=torch.zeros(len(demonstrations), dtype=torch.long),
        fields=[d.fields for d in demonstrations],
    )
