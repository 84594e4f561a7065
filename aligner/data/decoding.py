"""Decode sampled token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], keep_special_tokens: bool = False) -> str:
    """Decode sampled token ids.

    A model may have more embeddings than its tokenizer has tokens (the vocabulary is padded), and an untrained model
    samples those too. They are skipped, as fast tokenizers do; slow (Python) tokenizers would raise.
    """
    if not getattr(tokenizer, "is_fast", True):
        vocabulary = _vocabulary(tokenizer)
        ids = [token for token in ids if token in vocabulary]
    text: Any = tokenizer.decode(ids, skip_special_tokens=not keep_special_tokens)
    return str(text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(tokenizer.get_vocab().values())
