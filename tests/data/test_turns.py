"""Reasoning models' templates: what is trained is what a model would have to produce after the generation prompt."""

from collections import Counter
from itertools import product
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.answers import SPLIT
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.preferences import tokenize_preferences
from aligner.data.prompts import tokenize_prompts
from aligner.data.sets import prompts_of
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.data.turns import NOT_REASONED, REASONED
from tests.data.tokenizer_kinds import KINDS, tokenizer_of

ASK = {"role": "user", "content": "Why?"}
MORE = {"role": "user", "content": "And?"}
THOUGHT = "<think>\nhm\n</think>\n\nSo."


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def rows_of(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[str, str]], dict[str, int], list[TokenizedAnswer]]:
    """((what is read before, what is trained) of each row, notes, rows)."""
    notes = Counter[str]()
    rows, _ = tokenize_demonstrations([("d:1", {"messages": messages})], tokenizer, 1000, notes=notes)
    texts = []
    for row in rows:
        ends = max(k for k, on in enumerate(row.mask) if on) + 1
        assert row.mask[row.prompt_len : ends] == (True,) * (ends - row.prompt_len)
        read, trained = row.tokens[: row.prompt_len], row.tokens[row.prompt_len : ends]
        texts.append((str(tokenizer.decode(read)), str(tokenizer.decode(trained))))
    return texts, dict(notes), rows


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("opener", "content"),
    [
        *product(["<|A|><think>\n", "<|A|><think>", "<|A|>"], [THOUGHT, "<think>hm</think>So."]),
        *product(["<|A|><think>\n", "<|A|><think>"], ["hm\n</think>\n\nSo.\n"]),
    ],
)
def test_reasoning_is_trained_once_after_the_generation_prompt(kind: str, opener: str, content: str) -> None:
    tokenizer = tokenizer_of(kind, "opens_thought")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|A|><think>\n", opener)
    notes = Counter[str]()
    ((row,), _) = tokenize_demonstrations([("d", {"messages": [ASK, says(content)]})], tokenizer, 1000, notes=notes)
    asked = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    thought = content
    if opener != "<|A|>":
        thought = thought.removeprefix("<think>").removeprefix("\n" if opener.endswith("\n") else "")
    whole = tokenizer(f"{asked}{thought}</s>", add_special_tokens=False)
    assert list(row.tokens) == whole["input_ids"]
    (prompt,) = tokenize_prompts([("p", {"messages": [ASK]})], tokenizer, 1000)
    assert (row.asked or row.tokens[: row.prompt_len]) == prompt.tokens
    assert all(row.mask[row.prompt_len :]) and notes[REASONED] == 1


def test_an_answer_without_reasoning_is_trained_as_the_template_writes_it() -> None:
    tokenizer = tokenizer_of("byte_level", "opens_thought")
    texts, notes, (row,) = rows_of([ASK, says("So.")], tokenizer)
    assert list(row.tokens) == tokenizer.apply_chat_template([ASK, says("So.")], return_dict=False)
    assert texts == [("<s><|U|>Why?<|A|>", "So.</s>")]
    assert tokenizer.decode(row.asked) == "<s><|U|>Why?<|A|><think>\n" and notes == {NOT_REASONED: 1}
    # an answer that begins with another tag is no reasoning
    assert rows_of([ASK, says("<b>So</b>.")], tokenizer)[0] == [("<s><|U|>Why?<|A|>", "<b>So</b>.</s>")]


def test_each_answer_is_trained_in_the_context_of_its_generation() -> None:
    """Earlier reasoning is dropped by the template, as it is in a rollout's prompt."""
    tokenizer = tokenizer_of("byte_level", "opens_thought")
    texts, notes, _ = rows_of([ASK, says(THOUGHT), MORE, says("<think>\noh\n</think>Yes.")], tokenizer)
    assert texts == [
        ("<s><|U|>Why?<|A|><think>\n", "hm\n</think>\n\nSo.</s>"),
        ("<s><|U|>Why?<|A|>\n\nSo.</s><|U|>And?<|A|><think>\n", "oh\n</think>Yes.</s>"),
    ]
    assert notes == {REASONED: 2, SPLIT: 1}


BLOCK = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
AS_IT_IS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + BLOCK + "{% endif %}"
)
CLOSES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|A|></think>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|A|>"
    "{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}<think>{% endif %}{% endif %}"
)
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("template", "content", "thinks", "read", "trained"),
    [
        (AS_IT_IS, "hm\n</think>\n\nSo.", True, ASKED, "hm\n</think>\n\nSo."),  # as such a model's answers come
        (AS_IT_IS, THOUGHT, True, ASKED, "hm\n</think>\n\nSo."),
        (AS_IT_IS, "<think>hm", True, ASKED, "hm"),
        (AS_IT_IS, "So.", True, ASKED.removesuffix("<think>\n"), "So."),
        (AS_IT_IS, "So.", False, f"{ASKED}\n</think>\n\n", "So."),
        (AS_IT_IS, THOUGHT, False, ASKED.removesuffix("<think>\n"), THOUGHT),
        (CLOSES, "So.", True, "<|U|>Why?<|A|><think>", "</think>So."),
        (CLOSES, THOUGHT, True, "<|U|>Why?<|A|><think>", "\nhm\n</think>\n\nSo."),
        (CLOSES, "hm</think>So.", True, "<|U|>Why?<|A|><think>", "hm</think>So."),
        (CLOSES, "So.", False, "<|U|>Why?<|A|></think>", "So."),
        (CLOSES, THOUGHT, False, "<|U|>Why?<|A|></think>", "\n\nSo."),
    ],
)
def test_reasoning_as_it_is_asked_for(template: str, content: str, thinks: bool, read: str, trained: str) -> None:
    tokenizer = tokenizer_of("byte_level", "forgets_thought")
    tokenizer.chat_template = template
    row = {"messages": [ASK, says(content)], "chat_template_kwargs": {"enable_thinking": thinks}}
    ((found,), _) = tokenize_demonstrations([("d:1", row)], tokenizer, 1000)
    assert tokenizer.decode(found.tokens[: found.prompt_len]) == read
    assert tokenizer.decode([t for t, on in zip(found.tokens, found.mask, strict=True) if on]) == f"{trained}<|im_end|>"


def test_reasoning_of_its_own_field() -> None:
    tokenizer = tokenizer_of("byte_level", "forgets_thought")
    texts, notes, _ = rows_of([ASK, says("So.", reasoning_content="hm"), MORE, says(THOUGHT)], tokenizer)
    begin = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    again = "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [(begin, f"{THOUGHT}<|im_end|>"), (f"{begin}So.{again}", f"{THOUGHT}<|im_end|>")]
    assert notes == {SPLIT: 1}
    for name in ("chatml", "opens_thought"):
        with pytest.raises(
            ValueError, match=r"d:1: messages\[1\]: the chat template does not render 'reasoning_content'"
        ):
            rows_of([ASK, says("So.", reasoning_content="hm")], tokenizer_of("byte_level", name))


def test_turns_that_keep_their_form_stay_in_one_row() -> None:
    """Between two questions of a user the template keeps what was thought."""
    tokenizer = tokenizer_of("byte_level", "forgets_thought")
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "m.role == 'user'", "m.role == 'user' and m.content != 'go on'"
    )
    go_on = {"role": "user", "content": "go on"}
    messages = [ASK, says(THOUGHT), go_on, says(THOUGHT), MORE, says("So.")]
    _, notes, rows = rows_of_several(messages, tokenizer)
    assert [sum(on and not before for before, on in zip(row.mask, row.mask[1:], strict=False)) for row in rows] == [
        2,
        1,
    ]
    for row, turns in zip(rows, (4, 6), strict=True):
        assert list(row.tokens) == tokenizer.apply_chat_template(messages[:turns], return_dict=False)
    assert notes == {SPLIT: 1}


def rows_of_several(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[None, dict[str, int], list[TokenizedAnswer]]:
    notes = Counter[str]()
    rows, _ = tokenize_demonstrations([("d:1", {"messages": messages})], tokenizer, 1000, notes=notes)
    return None, dict(notes), rows


def test_a_pair_is_one_sequence_on_each_side() -> None:
    tokenizer = tokenizer_of("byte_level", "opens_thought")
    row = {"prompt": [ASK], "chosen": [says(THOUGHT)], "rejected": [says("<think>\nuh\n</think>No.")]}
    ((pair,), _) = tokenize_preferences([("p:1", row)], tokenizer, 1000)
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
    for side, said in ((pair.chosen, "hm\n</think>\n\nSo.</s>"), (pair.rejected, "uh\n</think>No.</s>")):
        assert list(side.tokens[: side.prompt_len]) == prompt
        assert tokenizer.decode(side.tokens[side.prompt_len :]) == said
    plain = {"prompt": [ASK], "chosen": [says("So.")], "rejected": [says("No.")]}
    pairs, _ = tokenize_preferences([("p:1", plain)], tokenizer, 1000)
    assert [list(found.tokens) for found in prompts_of(pairs, tokenizer)] == [prompt], "asked as a rollout is"
    several = {**row, "chosen": [says(THOUGHT), MORE, says(THOUGHT)]}
    with pytest.raises(ValueError, match=r"p:1: .* earlier turns of 'chosen' differently .* leave one assistant turn"):
        tokenize_preferences([("p:1", several)], tokenizer, 1000)


@pytest.mark.parametrize(
    ("asks", "writes"),
    [("<|A|>\n", "<|A|>"), ("<|A|>assistant:\n", "<|A|>assistant: "), ("ASSISTANT:\n", "ASSISTANT: ")],
)
def test_a_header_that_differs_at_its_end_is_only_read(asks: str, writes: str) -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + writes + "{{ m.content }}<|im_end|>{% else %}"
        "<|U|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '" + asks + "' }}{% endif %}"
    )
    texts, notes, (row,) = rows_of([ASK, says("So.")], tokenizer)
    assert list(row.tokens) == tokenizer.apply_chat_template([ASK, says("So.")], return_dict=False)
    assert texts == [("<|U|>Why?" + writes.rstrip(), " " * writes.endswith(" ") + "So.<|im_end|>")]
    assert notes == {NOT_REASONED: 1} and tokenizer.decode(row.asked) == "<|U|>Why?" + asks


def test_a_template_that_cannot_be_followed_is_refused() -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(ValueError, match=r"d:1: messages\[1\]: .* give the row as texts .'prompt' and 'completion'."):
        rows_of([ASK, says("So.")], tokenizer)
