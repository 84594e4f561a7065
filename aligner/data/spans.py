"""Map character positions of a text to token positions."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.data.tokenizer import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """A text (with special tokens written out) and its token ids."""

    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]] | None
    """Per token: its characters [begin, end); None: a slow tokenizer, which has no offsets."""


class Spans:
    """Encodes texts with one tokenizer and finds the token at a character position."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        named = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids}
        self._special = named | {i: token.content for i, token in added.items() if token.special}
        # Tokens matched verbatim anywhere: text from such a token on tokenizes the same on its own.
        self._cuts = {i: token.content for i, token in added.items() if not (token.normalized or token.single_word)}

    def is_special(self, encoded: Encoded, token: int) -> bool:
        """Whether this token is a special token that is written out in the text (unlike <unk> for unknown characters)."""
        return self._stands(self._special, encoded, token)

    def encode(self, text: str) -> Encoded:
        """Tokenize as `apply_chat_template(tokenize=True)` does."""
        if not self.tokenizer.is_fast:
            return Encoded(text, encode_plain(self.tokenizer, text), None)
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        return Encoded(text, list(encoding["input_ids"]), list(encoding["offset_mapping"]))

    def border(self, encoded: Encoded, position: int) -> tuple[int, bool]:
        """(index of the first token of `encoded.text[place:]`, True) if the text before `place` tokenizes the same alone;
        otherwise (index of the first token with a character from `place` on, False)."""
        tokens, offsets = encoded.tokens, encoded.offsets
        if position >= len(encoded.text):
            return len(tokens), True
        if offsets is None:
            prefix_tokens = encode_plain(self.tokenizer, encoded.text[:position])
            common = next(
                (k for k, pair in enumerate(zip(prefix_tokens, tokens, strict=False)) if pair[0] != pair[1]), None
            )
            common = min(len(prefix_tokens), len(tokens)) if common is None else common
            return common, common == len(prefix_tokens)
        reached = bisect_right(offsets, position, key=lambda span: span[1])
        cuts = (
            k for k in range(reached - 1, 0, -1) if offsets[k][1] <= position and self._stands(self._cuts, encoded, k)
        )
        cut = next(cuts, 0)
        for first in {cut: None, 0: None}:
            prefix_tokens = encode_plain(self.tokenizer, encoded.text[offsets[first][0] if first else 0 : position])
            if tokens[first : first + len(prefix_tokens)] == prefix_tokens:
                return first + len(prefix_tokens), True
        return reached, False

    def _stands(self, contents: dict[int, str], encoded: Encoded, token: int) -> bool:
        content = contents.get(encoded.tokens[token])
        if content is None or encoded.offsets is None:
            return content is not None
        begin, end = encoded.offsets[token]
        return encoded.text[begin:end].strip() == content.strip()
