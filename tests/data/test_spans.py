"""Borders between prompt and answer, in tokenizers that say where their tokens stand and in those that do not."""

import pytest
from transformers import ByT5Tokenizer

from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.spans import Spans
from aligner.data.tokenizer import encode_answered, encode_continuation, encode_text
from tests.data.chat_templates import TEMPLATES
from tests.data.tokenizer_kinds import KINDS, tokenizer_of

TALK = [
    {"role": "user", "content": "naïve ½ 😀"},
    {"role": "assistant", "content": "Paris is"},
    {"role": "user", "content": " What is it?\n"},
    {"role": "assistant", "content": "😀 Hello"},
]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_border_of_a_text(kind: str) -> None:
    """A border is clean where the ids before it, encoded alone, begin the whole."""
    tokenizer = tokenizer_of(kind, "zephyr")
    text = "<|user|>\nnaïve ½  😀</s>\n<|assistant|>  Paris\n\nis <s>it</s>"
    spans = Spans(tokenizer)
    encoded = spans.encode(text)
    borders = [spans.border(encoded, place) for place in range(len(text) + 1)]
    assert borders == sorted(borders, key=lambda border: border[0]), "later characters, later tokens"
    for place, (token, clean) in enumerate(borders):
        alone = tokenizer(text[:place], add_special_tokens=False)["input_ids"]
        assert clean == (encoded.tokens[: len(alone)] == alone), text[:place]
        if clean:
            assert token == len(alone)
        else:
            assert any(end > place for _, end in encoded.offsets[token : token + 1])
            assert all(end <= place for _, end in encoded.offsets[:token])


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer(
        extra_ids=0, additional_special_tokens=["<|head|>", "<|/head|>", "<|eot|>"], eos_token="<|eot|>"
    )
    assert not tokenizer.is_fast
    tokenizer.chat_template = TEMPLATES["headers"].plain.replace("{{ bos_token }}", "")
    ((found,), _) = tokenize_demonstrations([("d", {"messages": TALK})], tokenizer, 1000)
    assert list(found.tokens) == tokenizer.apply_chat_template(TALK, return_dict=False)
    asked = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert found.prompt_len == len(asked)
    trained = [token for token, on in zip(found.tokens, found.mask, strict=True) if on]
    assert tokenizer.decode(trained) == "Paris is<|eot|>😀 Hello<|eot|>"
    # the tokenizer's own end token after a text
    assert tokenizer.encode("Hi")[-1] == tokenizer.eos_token_id
    assert encode_text(tokenizer, "Hi") == tokenizer.encode("Hi", add_special_tokens=False)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("prompt", ["What is it?", "Paris\n", "Q: ", "<s>user", "12", "x", "é😀"])
@pytest.mark.parametrize("answer", ["Paris", " Paris is", "\nno", "345", "é", "a  b", "😀"])
def test_texts_are_one_text_with_a_border(kind: str, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(kind, "zephyr")
    read, rest = encode_answered(tokenizer, prompt, answer)
    assert read == tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + answer)["input_ids"]
    if whole[: len(read)] == read and len(whole) > len(read):
        assert read + rest == whole
    elif kind != "unigram":  # which loses spaces and knows no emoji
        assert tokenizer.decode(read + rest) == tokenizer.decode(read) + answer
    assert rest


@pytest.mark.parametrize("kind", ["pieces_legacy", "pieces", "metaspace_words"])
def test_no_space_comes_before_a_continuation(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "zephyr")
    for text in ("Paris", "x", " Paris", "\n\nno", "é"):
        assert (
            tokenizer.decode([tokenizer.convert_tokens_to_ids("x"), *encode_continuation(tokenizer, text)])
            == "x" + text
        )
