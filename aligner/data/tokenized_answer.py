"""What a data set of answers becomes: token ids and a loss mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenizedAnswer:
    """One tokenized sequence of prompt and answer, possibly with several turns."""

    tokens: tuple[int, ...]
    """Token ids, special tokens included."""
    mask: tuple[bool, ...]
    """Loss mask per token: True for an answer and its end token. Never True for the first token, which nothing predicts."""
    prompt_len: int
    """Number of tokens before the first trained answer."""
    fields: dict[str, Any]
    """The JSON row, with this answer's own 'score' or 'label' where known."""
    index: int = 0
    """Position among the rows (or pairs) that were kept, from 0."""
    asked: tuple[int, ...] | None = None
    """Prompt token ids for generation, where they differ from tokens[:prompt_len]; None: they do not."""
