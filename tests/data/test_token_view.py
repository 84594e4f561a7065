"""Pieces of a row: their texts joined are transformers' decoding, and each has the part that the mask says."""

import random

import pytest

from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.token_view import Counts, Part, pieces_of, spans_of, token_texts
from tests.data.tokenizer_kinds import KINDS, TEXT, tokenizer_of

SAID = ("Hello there", " What is it?", "👩‍👩‍👧 ok 😀", "日本語 naïve ½", "a\r\nb\t", "<|im_end|>", "  x", "<s>", "\n\n")


@pytest.mark.parametrize("kind", list(KINDS))
def test_texts_of_tokens_join_to_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    for seed in range(20):
        draw = random.Random(seed)
        text = "".join(draw.choices((*SAID, *TEXT[:4]), k=5))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = list(token_texts(tokenizer, ids))
        assert sum(count for _, count in texts) == len(ids)
        assert "".join(piece for piece, _ in texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_is_one_piece() -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    tokenizer.backend_tokenizer.model.dropout = 1.0  # no merges: a token is a byte
    ids = tokenizer("a😀é", add_special_tokens=False)["input_ids"]
    assert [(text, count) for text, count in token_texts(tokenizer, ids)] == [("a", 1), ("😀", 4), ("é", 2)]
    assert list(token_texts(tokenizer, ids[:3])) == [("a", 1), ("\N{REPLACEMENT CHARACTER}", 2)]


def test_parts_by_hand() -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}] * 2
    ((row,), _) = tokenize_demonstrations([("d", {"messages": messages})], tokenizer, 999)
    ask, rest = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "\n"
    wanted = [(Part.READ, ask), (Part.TRAINED, "Yo"), (Part.END, "<|im_end|>"), (Part.READ, f"{rest}{ask}")]
    wanted += [*wanted[1:3], (Part.READ, rest)]
    spans = [
        (part, "".join(piece.text for piece in run))
        for part, run in spans_of(pieces_of(tokenizer, row.tokens, row.mask))
    ]
    assert spans == wanted
    limited = [part for part, _ in spans_of(pieces_of(tokenizer, row.tokens, row.mask, limit=row.prompt_len + 1))]
    assert limited[-1] is Part.CUT and limited.count(Part.CUT) == 1
    assert Counts.of(row) == Counts(len(row.tokens), sum(row.mask))
    assert Counts(8, 2).share == 0.25
