"""Sampled token ids back into text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], keep_special_tokens: bool = False) -> str:
    """The text of tokens that a model has drawn.

    A model may have more embeddings than its tokenizer has tokens (they are rounded up), and an untrained one draws
    those too. They stand for no text and are left out, as tokenizers of the tokenizers library do; those written in
    Python raise.
    """
    if not getattr(tokenizer, "is_fast", True):
        known = _known(tokenizer)
        ids = [token for token in ids if token in known]
    text: Any = tokenizer.decode(ids, skip_special_tokens=not keep_special_tokens)
    return str(text)


@lru_cache(maxsize=4)
def _known(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(tokenizer.get_vocab().values())
