"""A tokenized row as pieces of text to be shown: what is read, what is trained, what ends a turn, what a limit cuts off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import TYPE_CHECKING

from aligner.data.tokenized_answer import TokenizedAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What incomplete UTF-8 decodes to."""


class Part(Enum):
    """What a token is for; the value is its name in legends."""

    READ = "read, not trained"
    TRAINED = "trained"
    END = "end of a trained turn"
    CUT = "beyond the limit"


@dataclass(frozen=True)
class Piece:
    """A token; or several, where a character of the text is spread over them."""

    text: str
    """As it stands in the sequence, special tokens written out."""
    ids: tuple[int, ...]
    part: Part


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], mask: Sequence[bool], limit: int | None = None
) -> list[Piece]:
    """The pieces of one sequence, whose texts joined are its text.

    Args:
        mask: True for trained tokens.
        limit: most tokens allowed (data.max_tokens, data.max_prompt_tokens); None: any number.
    """
    parts = _parts(tokenizer, tokens, mask, limit)
    pieces: list[Piece] = []
    start = 0
    for text, count in token_texts(tokenizer, tokens):
        pieces.append(Piece(text, tuple(tokens[start : start + count]), parts[start]))
        start += count
    return pieces


def spans_of(pieces: Sequence[Piece]) -> Iterator[tuple[Part, list[Piece]]]:
    """Runs of pieces of the same part."""
    return ((part, list(run)) for part, run in groupby(pieces, key=lambda piece: piece.part))


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(text, number of tokens) of each piece in a sequence: one token mostly; several that only together are whole
    characters. A token's text is what it adds to the text before it, so spaces are as in the sequence."""
    context = begin = 0  # tokens[context:begin] is the piece before, which decides about a space at the beginning
    for end in range(1, len(tokens) + 1):
        before = _decoded(tokenizer, tokens[context:begin])
        text = _decoded(tokenizer, tokens[context:end])
        if text.endswith(INCOMPLETE) and end < len(tokens):
            continue
        added = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, tokens[begin:end])
        yield added, end - begin
        context, begin = begin, end


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _parts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], mask: Sequence[bool], limit: int | None
) -> list[Part]:
    special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    special |= set(tokenizer.all_special_ids)
    parts: list[Part] = []
    for place, (token, trained) in enumerate(zip(tokens, mask, strict=True)):
        last = place + 1 == len(tokens) or not mask[place + 1]
        if limit is not None and place >= limit:
            parts.append(Part.CUT)
        elif trained:
            parts.append(Part.END if last and token in special else Part.TRAINED)
        else:
            parts.append(Part.READ)
    return parts


@dataclass(frozen=True)
class Counts:
    """Tokens of a sequence by what they are for."""

    tokens: int
    trained: int
    """Those with a loss, ends of turns included."""

    @classmethod
    def of(cls, answer: TokenizedAnswer) -> Counts:
        """Of a tokenized answer with its prompt."""
        return cls(len(answer.tokens), sum(answer.mask))

    @property
    def share(self) -> float:
        """Fraction of the tokens that is trained."""
        return self.trained / self.tokens if self.tokens else 0.0
