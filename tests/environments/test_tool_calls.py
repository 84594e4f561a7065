"""Parsers of tool calls beside vLLM's own, on one list of turns; where they differ, and what the model is told of its mistakes."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner.environments.parsers import named_parser
from aligner.environments.tool_calls import PARSERS, ParsedTurn, ToolCall, call_message, format_of
from tests.environments.families import FAMILIES, tokenizer_of

PROPERTIES = {
    "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}, "near": {"type": "array"},
    "at": {"type": "object"}, "share": {"type": "number"},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}}
]
OSLO = {"city": "Oslo", "days": 3}
CALL = json.dumps({"name": "weather", "arguments": OSLO})
PARAMETERS = json.dumps({"name": "weather", "parameters": OSLO})
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
GLM = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"

READ_ALIKE = [
    *[("hermes", "qwen3", text) for text in (
        "It is cold.", f"<tool_call>\n{CALL}\n</tool_call>", f"Let me see.\n<tool_call>{CALL}</tool_call>",
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", f"<tool_call>\n{CALL}",
        '<tool_call>{"name": "weather", "arguments": {"city": "Troms\\u00f8 {a}", "at": {"x": [1, null, true]}}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {}}</tool_call>',
    )],
    *[("llama3_json", "llama3.1", text) for text in (
        "It is cold.", PARAMETERS, f"<|python_tag|>{PARAMETERS}", f"{PARAMETERS}; {PARAMETERS}", CALL,
        '{"name": "weather", "parameters": {"at": {"x": {"y": "}"}}}}',
    )],
    *[("mistral", "mistral", text) for text in (
        "It is cold.", f"[TOOL_CALLS] [{CALL}]", f"[TOOL_CALLS] [{CALL}, {CALL}]",
    )],
    *[("pythonic", "llama3.2", text) for text in (
        "It is cold.", "[weather(city='Oslo', days=3)]", '[weather(city="Oslo"), weather(days=-3, exact=True, share=0.5)]',
        "[weather(near=['a', {'b': None}])]", "[weather()]",
    )],
    *[("qwen3_xml", "qwen3.5-think", text) for text in (
        "It is cold.", XML, f"Let me see.\n{XML}", f"{XML}\n{XML}",
        "<tool_call>\n<function=weather>\n<parameter=exact>\ntrue\n</parameter>\n<parameter=near>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nline 1\nline 2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n</function>\n</tool_call>",
    )],
    *[("glm", "glm4.5", text) for text in ("It is cold.", GLM, f"Let me see.\n{GLM}", f"{GLM}\n{GLM}")],
]  # fmt: skip
VLLM = {"glm": "glm45", "qwen3_xml": "qwen3_coder"}
"""Names that vLLM has for a format, where it has another."""


@pytest.mark.parametrize(("parser", "family", "text"), READ_ALIKE)
def test_vllm_reads_the_same(parser: str, family: str, text: str) -> None:
    ours = PARSERS[parser](text, TOOLS)
    theirs = named_parser(f"vllm:{VLLM.get(parser, parser)}", tokenizer_of(FAMILIES[family]))(text, TOOLS)
    assert ours.error is None
    assert ours.calls == theirs.calls
    assert ours.content.strip() == theirs.content.strip()


def value(chance: random.Random, depth: int = 0) -> Any:
    """A JSON value of any type."""
    text = "".join(chance.choice("aB é\n\"'<{}]日\\0,:=/") for _ in range(chance.randint(0, 6)))
    plain = [text, chance.randint(-99, 99), round(chance.uniform(-5, 5), 3), True, None]
    nested = [[value(chance, depth + 1)], {text: value(chance, depth + 1)}] if depth < 2 else []
    return chance.choice([*plain, *nested])


def written(parser: str, calls: list[ToolCall]) -> str:
    """Calls as a model of the family writes them."""
    if parser == "pythonic":
        made = (f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in calls)
        return f"[{', '.join(made)}]"
    if parser in ("qwen3_xml", "glm"):
        begin, pair, end = {
            "qwen3_xml": (
                "<tool_call>\n<function={}>\n",
                "<parameter={}>\n{}\n</parameter>\n",
                "</function>\n</tool_call>",
            ),
            "glm": ("<tool_call>{}\n", "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n", "</tool_call>"),
        }[parser]
        texts = ({k: v if isinstance(v, str) else json.dumps(v) for k, v in call.arguments.items()} for call in calls)
        return "\n".join(
            begin.format("weather") + "".join(pair.format(*one) for one in text.items()) + end for text in texts
        )
    key = "parameters" if parser == "llama3_json" else "arguments"
    objects = [json.dumps({"name": call.name, key: call.arguments}) for call in calls]
    if parser == "hermes":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    return "; ".join(objects) if parser == "llama3_json" else f"[TOOL_CALLS] [{', '.join(objects)}]"


@pytest.mark.parametrize(
    ("parser", "family"),
    [("hermes", "qwen3"), ("llama3_json", "llama3.1"), ("mistral", "mistral"), ("pythonic", "llama3.2"), ("qwen3_xml", "qwen3.5-think"), ("glm", "glm4.5")],
)  # fmt: skip
def test_any_call_is_read_as_it_was_written(parser: str, family: str) -> None:
    chance = random.Random(0)
    theirs = named_parser(f"vllm:{VLLM.get(parser, parser)}", tokenizer_of(FAMILIES[family]))
    typed = {"city": "a\nb {", "days": -3, "exact": True, "near": [1, "a"], "at": {"q": None}, "share": 0.5}
    for _ in range(40):
        if parser in ("qwen3_xml", "glm"):  # values are text, whose types the schema says
            made = [{k: v for k, v in typed.items() if chance.random() < 0.5} for _ in range(chance.randint(1, 2))]
        else:
            made = [{k: value(chance) for k in "xyz"[: chance.randint(0, 3)]} for _ in range(chance.randint(1, 2))]
        calls = [ToolCall("weather", arguments) for arguments in made]
        text = written(parser, calls)
        assert PARSERS[parser](text, TOOLS).calls == theirs(text, TOOLS).calls == tuple(calls)


@pytest.mark.parametrize(
    ("parser", "text", "error"),
    [
        ("hermes", "<tool_call>{bad}</tool_call>", "tool call 1 is not valid JSON"),
        ("hermes", f"<tool_call>{CALL}</tool_call><tool_call>{CALL[:-1]}", "tool call 2 is not valid JSON"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'must be an object with "name" and "arguments"'),
        ("hermes", '<tool_call>{"name": "weather"}</tool_call>', "of 'weather' has no \"arguments\""),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', "an object as arguments, not [1]"),
        ("hermes", "<tool_call>[]</tool_call>", "must be an object"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "is not valid JSON"),
        ("hermes", "<tool_call>", "is not valid JSON"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>', "must have finite numbers"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"days": 1e999}}</tool_call>', "must have finite numbers"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>', "valid text"),
        ("llama3_json", '{"name": "weather", "parameters": {', "is not valid JSON"),
        ("llama3_json", "<|python_tag|>weather.call()", "is not valid JSON"),
        ("mistral", "[TOOL_CALLS] nothing", "must be [{"),
        ("mistral", "[TOOL_CALLS] [1]", "must be an object"),
        ("mistral", "[TOOL_CALLS]weather{bad", "is not valid JSON"),
        ("pythonic", "[weather(city=Oslo)]", "must have literals as arguments, not Oslo"),
        ("pythonic", "[weather('Oslo')]", "must name its arguments"),
        ("pythonic", "[weather(city='Oslo'", "is not valid Python"),
        ("pythonic", "[weather(**x)]", "must name its arguments"),
        ("pythonic", "[weather(city=b'x')]", "must have literals"),
        ("pythonic", "[weather(at={1: 2})]", "texts as keys"),
        ("pythonic", "[weather(days=" + "-" * 50_000 + "1)]", ""),
        ("hermes", f'<tool_call>{{"name": "weather", "arguments": {{"near": {"[" * 900}{"]" * 900}}}}}', "is nested too deeply"),
        ("hermes", f'<tool_call>{{"name": "weather", "arguments": {{"near": {"[" * 64}{"]" * 64}}}}}', "is nested too deeply"),
        ("pythonic", "[weather(days=" + "-" * 1500 + "1)]", "is nested too deeply"),
        ("pythonic", "[weather(days=" + "x + " * 1500 + "1)]", "is nested too deeply"),
        ("pythonic", "[weather" + ".x" * 1500 + "(days=1)]", "is nested too deeply"),
        ("pythonic", "[weather(days=0x" + "f" * 5000 + ")]", "has too large a number"),
        ("qwen3_xml", f"<function=weather><parameter=near>{'[' * 100_000}", "is nested too deeply"),
        ("glm", f"<tool_call>weather<arg_key>near</arg_key><arg_value>{'[' * 100_000}", "is nested too deeply"),
        ("qwen3_xml", "<tool_call>\nweather\n</tool_call>", "must be <function=NAME>"),
        ("glm", "<tool_call>\n<arg_key>a</arg_key></tool_call>", "must be NAME"),
        ("harmony", "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{bad", "is not valid JSON"),
    ],
)  # fmt: skip
def test_malformed_calls_are_told_and_call_nothing(parser: str, text: str, error: str) -> None:
    parsed = PARSERS[parser](text, TOOLS)
    assert parsed.error is not None
    assert error in parsed.error
    assert not parsed.calls


@pytest.mark.parametrize(
    ("parser", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 3}"}</tool_call>', OSLO),
        ("hermes", f"<think>\n<tool_call>no</tool_call>\n</think>\n\n<tool_call>{CALL}</tool_call>", OSLO),
        ("mistral", f"[TOOL_CALLS]weather{json.dumps(OSLO)}", OSLO),
        ("mistral", f"[TOOL_CALLS]weather[ARGS]{json.dumps(OSLO)}", OSLO),
        ("llama3_json", f"I will look.\n{PARAMETERS}", OSLO),
        ("pythonic", "<|tool_call_start|>[weather(city='Oslo', days=3)]<|tool_call_end|>", OSLO),
        ("qwen3_xml", XML.replace("\n</parameter>\n</function>\n</tool_call>", ""), OSLO),
        ("qwen3_xml", XML.replace("\n3\n", "\nthree\n"), {"city": "Oslo", "days": "three"}),
        ("glm", GLM.replace(">Oslo<", ">3<"), {"city": "3", "days": 3}),
        ("harmony", f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{json.dumps(OSLO)}", OSLO),
    ],
)  # fmt: skip
def test_other_ways_to_write_a_call(parser: str, text: str, arguments: dict[str, Any]) -> None:
    assert PARSERS[parser](text, TOOLS).calls == (ToolCall("weather", arguments),)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", "<think>\n<tool_call>{}</tool_call>"),  # cut off while it thought
        ("llama3_json", '{"answer": 3}'),
        ("pythonic", "[1, 2]"),
        ("harmony", "no channel"),
        ("hermes", ""),
    ],
)
def test_what_is_no_call(parser: str, text: str) -> None:
    parsed = PARSERS[parser](text, TOOLS)
    assert (parsed.calls, parsed.error) == ((), None)


@pytest.mark.parametrize("parser", list(PARSERS))
@pytest.mark.parametrize(
    "piece", ["a", "<tool_call>", "<parameter=", "<arg_key>", "<arg_key>a</arg_key>", "<|message|>", "{", "["]
)
def test_a_turn_of_one_piece_over_and_over_is_read_in_linear_time(parser: str, piece: str) -> None:
    """As a policy that has collapsed writes it; in quadratic time these would take minutes."""
    for opener in ("", "<tool_call>a", "<function=a>", "<|channel|>final<|message|>a<|end|>"):
        PARSERS[parser](opener + piece * 30_000, TOOLS)


PIECES = (
    "<tool_call>", "</tool_call>", "<function=", ">", "</function>", "<parameter=a>", "</parameter>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "[", "]", "(", ")", "{", "}", '"name"', '"arguments"', ":", ",", '"', "a", "1", "=",
    "<|python_tag|>", "<think>", "</think>", "<|channel|>analysis", "<|channel|>commentary to=functions.a", "<|message|>", "<|end|>", "\n", " ", "\\",
    CALL, "\u00e9", "\0", "'", "-", "1e999", "NaN",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=200)
def test_no_text_makes_a_parser_raise(text: str) -> None:
    for parse in PARSERS.values():
        parsed = parse(text, TOOLS)
        assert not (parsed.calls and parsed.error)
        json.dumps(call_message(parsed, text, ["x"] * len(parsed.calls)))


def test_channels_of_gpt_oss() -> None:
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Cold."
    parsed = PARSERS["harmony"](text, TOOLS)
    assert parsed == ParsedTurn("Cold.", reasoning="hm")
    assert call_message(parsed, text, []) == {"role": "assistant", "content": "Cold.", "thinking": "hm"}
    plain = PARSERS["harmony"]("<|channel|>final<|message|>Cold.", TOOLS)
    assert call_message(plain, "", []) == {"role": "assistant", "content": "Cold."}


def test_the_message_of_a_call_keeps_the_reasoning() -> None:
    text = f"<think>\nhm\n</think>\n\nI look.\n<tool_call>{CALL}</tool_call>"
    message = call_message(PARSERS["hermes"](text, TOOLS), text, ["call00100"])
    assert message["content"] == "<think>\nhm\n</think>I look."
    assert message["tool_calls"] == [
        {"type": "function", "id": "call00100", "function": {"name": "weather", "arguments": OSLO}}
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2.5", "hermes"), ("qwen3", "hermes"), ("qwen3-2507", "hermes"), ("qwen3.5-think", "qwen3_xml"), ("qwen3.6", "qwen3_xml"),
        ("llama3.1", "llama3_json"), ("llama3.2", "llama3_json"), ("gpt-oss", "harmony"), ("glm4.5", "glm"), ("mistral", "mistral"), ("lfm2", "pythonic"),
    ],
)  # fmt: skip
def test_the_format_is_read_off_the_template(family: str, expected: str) -> None:
    assert format_of(FAMILIES[family].source) == expected


def test_unknown_parsers_are_refused_by_name() -> None:
    tokenizer = tokenizer_of(FAMILIES["phi3"])
    with pytest.raises(ValueError, match=r"environment\.tool_parser=auto: .*set it to hermes"):
        named_parser("auto", tokenizer)
    with pytest.raises(ValueError, match=r"environment\.tool_parser=qwen is none of auto, hermes"):
        named_parser("qwen", tokenizer)
    with pytest.raises(ValueError, match=r"environment\.tool_parser=vllm:qwen: vLLM has "):
        named_parser("vllm:qwen", tokenizer)
    for name in ("llama3_json", "openai"):  # it looks for a special token; it is not implemented outside the server
        with pytest.raises(ValueError, match=rf"environment\.tool_parser=vllm:{name} does not fit this tokenizer"):
            named_parser(f"vllm:{name}", tokenizer)
