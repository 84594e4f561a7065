"""What reaches a chat template, in which form, and which rows are refused since the template leaves something out."""

import json
from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.chat import NO_TOOLS, PLAIN, ChatOptions, check_template_kwargs
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.preferences import tokenize_feedback, tokenize_preferences
from aligner.data.prompts import tokenize_prompts
from tests.data.chat_templates import CHATML
from tests.data.tokenizer_kinds import tokenizer_of

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ASK = {"role": "user", "content": "Rain in Oslo?"}
NO = {"role": "assistant", "content": "No."}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def prompt_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **more: Any) -> str:
    (prompt,) = tokenize_prompts([("p:1", row)], tokenizer, 1000, **more)
    ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert list(prompt.tokens) == ids
    return prompt.text


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **more: Any) -> str:
    (found,), _ = tokenize_demonstrations([("d:1", row)], tokenizer, 1000, **more)
    return str(tokenizer.decode([token for token, on in zip(found.tokens, found.mask, strict=True) if on]))


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_reach_the_template_on_every_path(written: Any) -> None:
    tokenizer = tokenizer_of("byte_level", "tools")
    row = {"messages": [ASK], "tools": written}
    wanted = tokenizer.apply_chat_template([ASK], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert "weather" in wanted and prompt_of(row, tokenizer) == wanted
    whole = tokenizer.apply_chat_template([ASK, NO], tools=TOOLS, return_dict=False)
    asked = tokenizer.apply_chat_template([ASK], tools=TOOLS, add_generation_prompt=True, return_dict=False)
    yes = {"role": "assistant", "content": "Yes."}
    two = {"prompt": [ASK], "chosen": [NO], "rejected": [yes], "tools": written}
    scored = {"query": [ASK], "response": [[NO], [yes]], "score": [1, 0], "tools": written}
    conversations = {"chosen": [ASK, NO], "rejected": [ASK, yes], "tools": written}
    labelled = {"prompt": [ASK], "completion": [NO], "label": True, "tools": written}
    found = [
        tokenize_demonstrations([("d:1", {**row, "messages": [ASK, NO]})], tokenizer, 1000)[0][0],
        *(tokenize_preferences([("p:1", pair)], tokenizer, 1000)[0][0].chosen for pair in (two, scored, conversations)),
        tokenize_feedback([("f:1", labelled)], tokenizer, 1000)[0][0],
    ]
    for answered in found:
        assert (list(answered.tokens), answered.prompt_len) == (whole, len(asked))


@pytest.mark.parametrize("empty", [None, [], "", "[]", "null"])
def test_no_tools_are_none(empty: Any) -> None:
    tokenizer = tokenizer_of("byte_level", "tools")
    text = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert prompt_of({"messages": [ASK], "tools": empty, "chat_template_kwargs": None}, tokenizer) == text


def test_tools_that_the_template_does_not_write_are_counted() -> None:
    tokenizer, notes = tokenizer_of("byte_level", "chatml"), Counter[str]()
    tokenize_prompts([("p:1", {"messages": [ASK], "tools": TOOLS})] * 3, tokenizer, 1000, notes=notes)
    assert notes == {NO_TOOLS: 3}


@pytest.mark.parametrize("content", ["", None, "..."])
@pytest.mark.parametrize("arguments", [{}, {"city": "Oslo é"}])
def test_a_turn_of_tool_calls_is_an_answer(content: str | None, arguments: dict[str, Any]) -> None:
    tokenizer = tokenizer_of("byte_level", "tools")
    turn = {"role": "assistant", "content": content, "tool_calls": [call(arguments)]}
    written = f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n'
    wanted = f"{content or ''}{written}</tool_call><|im_end|>"
    nulls = {"role": "user", "content": "Rain in Oslo?", "tool_calls": None, "name": None}
    for form in (turn, turn if content else {k: v for k, v in turn.items() if k != "content"}):
        assert trained({"messages": [nulls, form], "tools": TOOLS}, tokenizer) == wanted
    as_text = {**turn, "tool_calls": json.dumps([call(json.dumps(arguments))])}
    assert trained({"messages": [ASK, as_text]}, tokenizer) == wanted, "JSON text, as OpenAI gives it"


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city":"Oslo"}'])
def test_a_template_that_takes_json_text_gets_it(arguments: Any) -> None:
    tokenizer = tokenizer_of("byte_level", "joins_arguments")
    turn = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert trained({"messages": [ASK, turn]}, tokenizer) == f"call weather: {text};</s>"


def test_no_content_is_not_written_as_none() -> None:
    tokenizer = tokenizer_of("byte_level", "tools")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("m.content or ''", "m.content")
    turn = {"role": "assistant", "content": None, "tool_calls": [call({})]}
    assert trained({"messages": [{"role": "user", "content": "None?"}, turn]}, tokenizer).startswith("<tool_call>")


def test_an_answer_of_no_calls_is_empty() -> None:
    turn = {"role": "assistant", "content": " ", "tool_calls": "[]"}
    with pytest.raises(ValueError, match=r"^d:1: messages\[1\] is an assistant turn with an empty 'content'"):
        trained({"messages": [ASK, turn]}, tokenizer_of("byte_level", "tools"))


def test_calls_that_the_template_does_not_write_are_refused() -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    for content in ("", "Let me see."):
        row = {"messages": [ASK, {"role": "assistant", "content": content, "tool_calls": [call({})]}]}
        with pytest.raises(ValueError, match=r"^d:1: messages\[1\]: the chat template does not render 'tool_calls'"):
            trained(row, tokenizer)


def test_the_name_of_a_result_is_not_that_of_its_call() -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.name or '' }}{{ m.content }}")
    turn = {"role": "assistant", "content": "Let me see.", "tool_calls": [call({})]}
    result = {"role": "tool", "name": "weather", "content": "Rain."}
    with pytest.raises(ValueError, match=r"^d:1: messages\[1\]: the chat template does not render 'tool_calls'"):
        trained({"messages": [ASK, turn, result, NO]}, tokenizer)


PARTS = [{"type": "text", "text": "Rain in"}, {"type": "text", "text": "Oslo?"}]
TAKES_PARTS = CHATML.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }};{% endif %}{% endfor %}"
)


def test_content_in_parts() -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    row = {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[:1]}]}
    assert prompt_of({"messages": row["messages"][:1]}, tokenizer).startswith(
        "<|im_start|>user\nRain in\nOslo?<|im_end|>"
    )
    assert trained(row, tokenizer) == "Rain in<|im_end|>"
    trims = tokenizer_of("byte_level", "headers")
    assert "user<|/head|>\n\nRain in\nOslo?<|eot|>" in prompt_of({"messages": row["messages"][:1]}, trims)
    # a template of a model that also sees pictures takes parts as they are, and texts as parts
    tokenizer.chat_template = TAKES_PARTS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert trained(row, tokenizer) == "Rain in;<|im_end|>"
    assert trained({"messages": [ASK, NO]}, tokenizer) == "No.;<|im_end|>"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"\[0\]: .* part of type 'image_url'"),
        ({"role": "user", "content": [*PARTS, {"type": "image"}]}, r"messages\[0\]: .* part of type 'image'"),
        ({"role": "user", "content": ["hello"]}, r"messages\[0\]: .* part of type 'str'"),
        ({"role": "user", "content": []}, r"messages\[0\] must have 'role' and 'content' as texts"),
        ({"role": "user", "content": {"text": "a"}}, r"messages\[0\] must have 'role' and 'content' as texts"),
        ({"from": "human", "value": "a"}, r"messages\[0\] must have 'role' and 'content' as texts"),
        ({"content": "a"}, r"messages\[0\] must have 'role' and 'content' as texts"),
        (
            {"role": "user", "content": None, "tool_calls": "[]"},
            r"messages\[0\] has neither 'content' nor 'tool_calls'",
        ),
        ({"role": "user", "tool_calls": [1]}, r"messages\[0\]: 'tool_calls' must be a list such as"),
        ({"role": "user", "tool_calls": "[{"}, r"messages\[0\]: 'tool_calls' is not valid JSON"),
    ],
)
def test_messages_that_no_template_can_take_are_refused(message: dict[str, Any], reason: str) -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    for row in ({"messages": [message]}, {"messages": [message, ASK]}):
        with pytest.raises(ValueError, match=rf"^p:1: .*{reason}"):
            tokenize_prompts([("p:1", row)], tokenizer, 1000)


KNOWS_TWO = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}<|assistant|>"
    "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("role", ["system", "tool", "developer", "human", "Assistant"])
def test_a_role_that_the_template_leaves_out_is_named(role: str) -> None:
    tokenizer = tokenizer_of("byte_level", "zephyr")
    tokenizer.chat_template = KNOWS_TWO
    # its content also stands in another message, and is a part of a word
    for content in ("Oslo?", "ai", "Be brief.\n", "<b>x</b>"):
        row = {"messages": [ASK, NO, {"role": role, "content": content}, {"role": "user", "content": "x"}]}
        with pytest.raises(ValueError, match=rf"^p:1: messages\[2\]: the chat template drops .* role '{role}'"):
            tokenize_prompts([("p:1", row)], tokenizer, 1000)


def test_what_a_template_writes_otherwise_is_not_left_out() -> None:
    tokenizer = tokenizer_of("byte_level", "zephyr")
    tokenizer.chat_template = KNOWS_TWO.replace("{{ m.content }}", "{{ m.content | upper | replace('O', '0') }}")
    assert prompt_of({"messages": [ASK]}, tokenizer) == "<|user|>RAIN IN 0SL0?<|assistant|>"


def test_variables_of_the_template() -> None:
    tokenizer = tokenizer_of("byte_level", "forgets_thought")
    off = {"enable_thinking": False}
    wanted = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert wanted.endswith("<think>\n\n</think>\n\n")
    assert prompt_of({"messages": [ASK], "chat_template_kwargs": off}, tokenizer) == wanted
    assert prompt_of({"messages": [ASK], "chat_template_kwargs": json.dumps(off)}, tokenizer) == wanted
    assert prompt_of({"messages": [ASK]}, tokenizer, chat=ChatOptions(off)) == wanted
    own = {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": True}}
    assert prompt_of(own, tokenizer, chat=ChatOptions(off)) != wanted
    assert trained({"messages": [ASK, NO]}, tokenizer) == "<think>\n\n</think>\n\nNo.<|im_end|>"
    assert trained({"messages": [ASK, NO]}, tokenizer, chat=ChatOptions(off)) == "No.<|im_end|>"
    assert trained({"prompt": [ASK], "completion": [NO], "chat_template_kwargs": off}, tokenizer) == "No.<|im_end|>"
    documents = tokenizer_of("byte_level", "chatml")
    documents.chat_template = "{% for d in documents %}{{ d.title }}\n{% endfor %}" + str(documents.chat_template)
    row = {"messages": [ASK], "chat_template_kwargs": {"documents": [{"title": "Norway", "text": ""}]}}
    assert prompt_of(row, documents).startswith("Norway\n<|im_start|>user")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": "none"}, "'tools' is not valid JSON"),
        ({"tools": {"name": "weather"}}, "'tools' must be a list of definitions such as"),
        ({"tools": [3]}, "'tools' must be a list of definitions such as"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object such as"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs' cannot set 'tokenize'; remove it"),
        ({"chat_template_kwargs": {"tools": TOOLS}}, "cannot set 'tools'; give it as a field of the row"),
    ],
)
def test_fields_for_the_template_are_checked(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^p:1: .*{reason}"):
        prompt_of({"messages": [ASK], **fields}, tokenizer_of("byte_level", "tools"))


def test_a_variable_for_all_rows_must_be_the_templates() -> None:
    tokenizer = tokenizer_of("byte_level", "forgets_thought")
    check_template_kwargs(tokenizer, {"enable_thinking": False, "documents": []})
    with pytest.raises(
        ValueError, match=r"data\.chat_template_kwargs\.enable_thinkin is not a variable of the tokenizer's"
    ):
        check_template_kwargs(tokenizer, {"enable_thinkin": False})
    with pytest.raises(ValueError, match=r"data\.chat_template_kwargs\.tools cannot be set"):
        check_template_kwargs(tokenizer, {"tools": []})


SYSTEM = {"role": "system", "content": "Rhyme."}
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("own", [[], [SYSTEM], [{**SYSTEM, "role": "developer"}]], ids=["none", "system", "developer"])
@pytest.mark.parametrize(("prompt", "wanted"), [(None, None), ("Be brief.", [BRIEF]), ("", [])])
def test_a_system_prompt_for_all_rows_on_every_path(
    own: list[dict[str, Any]], prompt: str | None, wanted: list[dict[str, Any]] | None
) -> None:
    tokenizer, chat = tokenizer_of("byte_level", "tools"), ChatOptions(system_prompt=prompt)
    before = own if wanted is None else wanted
    yes = {"role": "assistant", "content": "Yes."}
    asked = tokenizer.apply_chat_template([*before, ASK], tokenize=False, add_generation_prompt=True)
    assert prompt_of({"messages": [*own, ASK]}, tokenizer, chat=chat) == asked
    whole = tokenizer.apply_chat_template([*before, ASK, NO], return_dict=False)
    begin = tokenizer(asked, add_special_tokens=False)["input_ids"]
    pair = {"prompt": [*own, ASK], "chosen": [NO], "rejected": [yes]}
    conversations = {"chosen": [*own, ASK, NO], "rejected": [*own, ASK, yes]}
    labelled = {"prompt": [*own, ASK], "completion": [NO], "label": True}
    tokenized = [
        tokenize_demonstrations([("d:1", {"messages": [*own, ASK, NO]})], tokenizer, 1000, chat=chat)[0][0],
        *(
            tokenize_preferences([("p:1", row)], tokenizer, 1000, chat=chat)[0][0].chosen
            for row in (pair, conversations)
        ),
        tokenize_feedback([("f:1", labelled)], tokenizer, 1000, chat=chat)[0][0],
    ]
    for answered in tokenized:
        assert (list(answered.tokens), answered.prompt_len) == (whole, len(begin))
        assert answered.mask == (False,) * len(begin) + (True,) * (len(whole) - len(begin) - 1) + (False,)


def test_errors_name_messages_by_their_place_in_the_row() -> None:
    tokenizer, chat = tokenizer_of("byte_level", "tools"), ChatOptions(system_prompt="Be brief.")
    row = {"messages": [ASK, NO, ASK, {"role": "assistant", "content": " "}]}
    for options in (PLAIN, chat):
        with pytest.raises(ValueError, match=r"^d:1: messages\[3\] is an assistant turn with an empty 'content'"):
            trained(row, tokenizer, chat=options)
    no_system = tokenizer_of("byte_level", "gemma")
    with pytest.raises(ValueError, match=r"^p:1: the chat template rejects these messages: no system role"):
        prompt_of({"messages": [ASK]}, no_system, chat=chat)
    leaves_out = tokenizer_of("byte_level", "zephyr")
    leaves_out.chat_template = KNOWS_TWO
    with pytest.raises(ValueError, match=r"^p:1: data\.system_prompt: the chat template drops .* role 'system'"):
        prompt_of({"messages": [ASK]}, leaves_out, chat=chat)


@pytest.mark.parametrize("prompt", ["Be brief.", ""])
def test_plain_text_has_no_system_prompt(prompt: str) -> None:
    tokenizer, chat = tokenizer_of("byte_level", "chatml"), ChatOptions(system_prompt=prompt)
    reason = r"^d:1: data\.system_prompt is for conversations, and 'prompt' of this row is plain text"
    with pytest.raises(ValueError, match=reason):
        tokenize_prompts([("d:1", {"prompt": "a"})], tokenizer, 99, chat=chat)
    with pytest.raises(ValueError, match=reason):
        tokenize_demonstrations([("d:1", {"prompt": "a", "completion": "b"})], tokenizer, 99, chat=chat)


def test_a_system_message_alone_is_no_conversation_without_it() -> None:
    with pytest.raises(ValueError, match=r"^p:1: 'messages' has nothing but the system prompt"):
        prompt_of({"messages": [SYSTEM]}, tokenizer_of("byte_level", "chatml"), chat=ChatOptions(system_prompt=""))
