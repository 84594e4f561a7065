"""Random conversations under templates and tokenizers of every kind: the ids are transformers', and what is trained is
what `{% generation %}` marks in the same template."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.prompts import tokenize_prompts
from tests.data.chat_templates import SPECIAL, TEMPLATES, Template
from tests.data.tokenizer_kinds import KINDS, tokenizer_of

SAID = (
    "Hello there", " What is it?", "Paris\n", "\n\nno", "", "  ", "👩‍👩‍👧 ok 😀", "é", "naïve ½ ﬁne", "日本語", "a\r\nb\t", "3.14159",
    "I'd <b>say</b>", "[INST] x", "None", "user", " ", "\n", "x" * 30, "текст ", '{"a": [1]}', "Hi", "## x\n\n- y\n",
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "é", "parameters": {"type": "object"}}}


def said(draw: random.Random, special: bool = False) -> str:
    parts = draw.choices(SAID + (SPECIAL if special else ()), k=draw.randint(1, 4))
    return draw.choice(["", " "]).join(parts)


def answer(draw: random.Random, template: Template) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said(draw)}
    if template.tools and draw.random() < 0.5:
        arguments: Any = {"city": draw.choice(["Oslo", "é😀", 'a"b']), "days": 3}
        if template.text_arguments:
            arguments = json.dumps(arguments)
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        message |= {"tool_calls": [call] * draw.randint(1, 2), "content": draw.choice(["", None, message["content"]])}
    elif not message["content"].strip():
        message["content"] += "Yes"
    return message


def conversation(draw: random.Random, template: Template) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if template.system and draw.random() < 0.4:
        messages.append({"role": "system", "content": "Be brief. " + said(draw)})
    for _ in range(draw.randint(1, 4)):
        for _ in range(1 if template.alternates else draw.randint(1, 2)):
            messages.append({"role": "user", "content": said(draw, special=True)})
        messages.append(answer(draw, template))
        if template.tools and "tool_calls" in messages[-1] and draw.random() < 0.7:
            messages += [{"role": "tool", "name": "weather", "content": said(draw)}, answer(draw, template)]
    return messages


def reference(
    tokenizer: PreTrainedTokenizerFast, marked: str, messages: list[dict[str, Any]], more: dict[str, Any]
) -> tuple[list[int], list[list[bool | None]]]:
    """(transformers' ids, for each assistant's turn which tokens hold its characters; None: a token of no width)."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more)
    variables = {**tokenizer.special_tokens_map, **more}
    (text,), (marks,) = render_jinja_template(
        [messages], chat_template=marked, return_assistant_tokens_mask=True, **variables
    )
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, **more)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return ids, [[None if s == e else s < end and e > begin for s, e in spans] for begin, end in marks]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("conversations", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_conversations(name: str, kind: str, conversations: int) -> None:
    template, tokenizer = TEMPLATES[name], tokenizer_of(kind, name, marked=name == "dated")
    more: dict[str, Any] = {"tools": [TOOL]} if template.tools else {}
    strips = next((i for i, token in tokenizer.added_tokens_decoder.items() if token.rstrip), None)
    for seed in range(conversations):
        draw = random.Random(f"{name} {seed}")
        messages = conversation(draw, template)
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        rows, _ = tokenize_demonstrations([("d:1", {"messages": messages, **more})], tokenizer, 1 << 20)
        assert template.rewrites or len(rows) == 1
        done = 0
        for row in rows:
            # the last turn of the row: the first whose conversation has these ids
            for last in answers[done:]:
                ids, holds = reference(tokenizer, template.marked, messages[: last + 1], more)
                wanted_end = [] if template.closes else [tokenizer.eos_token_id]
                if list(row.tokens) == ids + wanted_end:
                    break
            else:
                raise AssertionError((messages, tokenizer.convert_ids_to_tokens(list(row.tokens))))
            count = answers.index(last) + 1 - done
            wanted = [any(turn[k] for turn in holds[-count:]) for k in range(len(ids))] + [True] * (not template.closes)
            # a token that takes the blanks after it (rstrip) is the prompt's, though an answer's first blank is in it
            unsure = [k for k in range(len(ids)) if holds[0][k] is None or ids[k] == strips]
            trained = [
                (k, t) for k, (t, m, w) in enumerate(zip(row.tokens, row.mask, wanted, strict=True))
                if m != w and k not in unsure
            ]  # fmt: skip
            assert not trained, (messages, trained, tokenizer.convert_ids_to_tokens(list(row.tokens)), row.mask, wanted)
            asked = tokenizer.apply_chat_template(
                messages[: answers[done]], tokenize=True, return_dict=False, add_generation_prompt=True, **more
            )
            if row.tokens[: len(asked)] == tuple(asked):
                assert (row.prompt_len, row.asked) == (len(asked), None), messages
            else:
                assert row.asked == tuple(asked)
            (prompt,) = tokenize_prompts([("p", {"messages": messages[: answers[done]], **more})], tokenizer, 1 << 20)
            assert list(prompt.tokens) == asked
            done += count
        assert done == len(answers)
