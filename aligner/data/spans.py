"""Which tokens stand for which characters of a text."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner.data.tokenizer import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """A text with all its special tokens written, and its tokens."""

    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]] | None
    """Per token: the characters that it stands for, [begin, end); None: the tokenizer cannot say."""


class Spans:
    """Encodes texts with one tokenizer, and finds where in their tokens a character stands."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        named = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids}
        self._special = named | {i: token.content for i, token in added.items() if token.special}
        # Found as they stand wherever they stand: the text from one of them on has the same tokens alone.
        self._cuts = {i: token.content for i, token in added.items() if not (token.normalized or token.single_word)}

    def is_special(self, encoded: Encoded, token: int) -> bool:
        """Whether a special token stands there, written out (one for unknown characters does not)."""
        return self._stands(self._special, encoded, token)

    def encode(self, text: str) -> Encoded:
        """The ids that `apply_chat_template(tokenize=True)` gives this text."""
        if not self.tokenizer.is_fast:
            return Encoded(text, encode_plain(self.tokenizer, text), None)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        return Encoded(text, list(found["input_ids"]), list(found["offset_mapping"]))

    def border(self, encoded: Encoded, place: int) -> tuple[int, bool]:
        """(the first token of `encoded.text[place:]`, True) where the text before `place` has the same tokens alone;
        where it has not, (the first token that stands for a character from `place` on, False)."""
        tokens, offsets = encoded.tokens, encoded.offsets
        if place >= len(encoded.text):
            return len(tokens), True
        if offsets is None:
            alone = encode_plain(self.tokenizer, encoded.text[:place])
            common = next((k for k, pair in enumerate(zip(alone, tokens, strict=False)) if pair[0] != pair[1]), None)
            common = min(len(alone), len(tokens)) if common is None else common
            return common, common == len(alone)
        reached = bisect_right(offsets, place, key=lambda span: span[1])
        cuts = (k for k in range(reached - 1, 0, -1) if offsets[k][1] <= place and self._stands(self._cuts, encoded, k))
        cut = next(cuts, 0)
        for first in {cut: None, 0: None}:
            alone = encode_plain(self.tokenizer, encoded.text[offsets[first][0] if first else 0 : place])
            if tokens[first : first + len(alone)] == alone:
                return first + len(alone), True
        return reached, False

    def _stands(self, contents: dict[int, str], encoded: Encoded, token: int) -> bool:
        content = contents.get(encoded.tokens[token])
        if content is None or encoded.offsets is None:
            return content is not None
        begin, end = encoded.offsets[token]
        return encoded.text[begin:end].strip() == content.strip()
