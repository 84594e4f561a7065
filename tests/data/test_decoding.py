"""Ids that the tokenizer has no token for stand for no text, whatever kind of tokenizer it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import EsmTokenizer, GPTSw3Tokenizer, PreTrainedTokenizerBase

from aligner.data.decoding import decode
from tests.data.byte_level import LETTERS, make_tokenizer


def of_pieces(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer written in Python, whose own decode raises IndexError for such ids."""
    (folder / "text").write_text("hello world one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=24, minloglevel=2
    )
    tokenizer = GPTSw3Tokenizer(str(folder / "spiece.model"), name_or_path="gpt-sw3")
    with pytest.raises(IndexError):
        tokenizer.decode([5, 1000])
    return tokenizer


def of_words(folder: Path) -> PreTrainedTokenizerBase:
    (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "<mask>"]))
    return EsmTokenizer(str(folder / "vocab.txt"))


@pytest.mark.parametrize("beyond", [[1000], [400, 65535], [10**6]])
def test_ids_beyond_the_tokenizer(tmp_path: Path, beyond: list[int]) -> None:
    fast = make_tokenizer(tmp_path / "fast", ["<eos>"])
    tokens = fast.encode("ab")
    assert decode(fast, [*tokens, *beyond, LETTERS]) == "ab"
    assert decode(fast, [*tokens, *beyond, LETTERS], keep_special_tokens=True) == "ab<eos>"
    assert decode(fast, beyond) == "" == decode(fast, [])
    for slow in (of_pieces(tmp_path), of_words(tmp_path)):
        known = [4, 5, 4]
        assert decode(slow, [4, *beyond, 5, 4]) == slow.decode(known, skip_special_tokens=True) != ""


def test_added_tokens_are_known_to_a_slow_tokenizer(tmp_path: Path) -> None:
    tokenizer = of_words(tmp_path)
    tokenizer.add_tokens(["<tool>"])
    assert "<tool>" in decode(tokenizer, [4, len(tokenizer) - 1, 999])
