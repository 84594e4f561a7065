"""Rows in the schemas of the sets that everybody uses, as they are published, and what they are in TRL's data set types.

The TRL side is written by hand: {"prompt", "completion"}, {"messages"} or {"prompt", "chosen", "rejected"}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def said(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


@dataclass(frozen=True)
class Sample:
    """One row of a format."""

    format: str
    kind: str
    row: Row
    trl: Row
    """TRL's row; of prompts {"prompt"}."""
    fields: Row = field(default_factory=dict)
    """What a reward is given beside the response."""
    needs: frozenset[str] = frozenset()
    """What the chat template must know: "system", "tools"."""


QUESTION = "Natalia sold clips to 48 friends, and half as many in May. How many in all?"
SOLUTION = "She sold 48/2 = <<48/2=24>>24 in May.\n48+24 = 72, and 1,000 more.\n#### 1,072"
GSM8K = {"question": QUESTION, "answer": SOLUTION}
MATH = {
    "problem": "What is $\\frac{1}{2}+\\frac{1}{3}$?", "level": "Level 1", "type": "Algebra",
    "solution": "It is \\boxed{9}, no: $\\boxed{\\frac{5}{6}}$.",
}  # fmt: skip
DAPO_TEXT = "Solve step by step. The last line is Answer: $Answer.\n\nFind $x$."
DAPO = {
    "data_source": "math_dapo", "prompt": [user(DAPO_TEXT)], "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b6eb4"},
}  # fmt: skip
DEEPSCALER = {"problem": "Compute $2+2$.", "answer": "4", "solution": "It is $4$."}
BINARIZED = {
    "prompt": "What is it?", "prompt_id": "ab12", "messages": [user("What is it?"), said("Paris")],
    "chosen": [user("What is it?"), said("Paris")], "rejected": [user("What is it?"), said("I'd say no")],
    "score_chosen": 8.5, "score_rejected": 7.0,
}  # fmt: skip
ORIGINAL = {
    "source": "evol_instruct", "instruction": "What is it?", "models": ["alpaca-7b", "bard"],
    "completions": [
        {"model": "alpaca-7b", "response": "I'd say no", "overall_score": 4.0, "annotations": {"honesty": {"Rating": "3"}}},
        {"model": "bard", "response": "Paris", "overall_score": 8.5, "annotations": {"honesty": {"Rating": "5"}}},
    ],
    "correct_answers": ["None"],
}  # fmt: skip
HH = {
    "chosen": "\n\nHuman: Hello there\n\nAssistant: Hi.\n\nHuman: What is it?\n\nAssistant: Paris",
    "rejected": "\n\nHuman: Hello there\n\nAssistant: Hi.\n\nHuman: What is it?\n\nAssistant: I'd say no",
}
HH_PROMPT = [user("Hello there"), said("Hi."), user("What is it?")]
PAIR = {"chosen": [said("Paris")], "rejected": [said("I'd say no")]}
TULU = {"id": "t1", "source": "ai2", "messages": [user("Hello there"), said("Hi."), user("What is it?"), said("Paris")]}
SHAREGPT = {
    "id": "s1",
    "conversations": [
        {"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Hi."},
        {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "Paris"},
    ],
}  # fmt: skip
ALPACA = {
    "instruction": "Translate to English.",
    "input": "naïve café",
    "output": "It is Paris.",
    "text": "Below is ...",
}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "é", "parameters": WEATHER}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = [user("What is it?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
RESULT = [{"role": "tool", "content": "3.14"}, said("It is 3.14")]
ANTHROPIC = {"messages": [user("Hello there"), {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}]}
ANTHROPIC_TOOLS = {
    "system": "Be brief.",
    "tools": [{"name": "weather", "description": "é", "input_schema": WEATHER}],
    "messages": [
        user("What is it?"),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "3.14"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 3.14"}]},
    ],
}  # fmt: skip
OPENAI_TOOLS = {
    "tools": [TOOL],
    "parallel_tool_calls": False,
    "messages": [
        {"role": "developer", "content": "Be brief."},
        user("What is it?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3.14"},
        {"role": "assistant", "content": "It is 3.14"},
    ],
}  # fmt: skip
OPENAI_FUNCTIONS = {
    "functions": [FUNCTION],
    "messages": [
        user("What is it?"),
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "name": "weather", "content": "3.14"},
        said("It is 3.14"),
    ],
}
OPENAI_PAIR = {
    "input": {"messages": [user("What is it?")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": PAIR["chosen"],
    "non_preferred_output": PAIR["rejected"],
}
CHATLEARN_PAIR = {"query": "What is it?", "response": ["I'd say no", "Paris"], "score": [0.1, 0.9]}
ASKED = {"prompt": [user("What is it?")]}

SAMPLES = [
    Sample("gsm8k", "prompts", GSM8K, {"prompt": [user(QUESTION)]}, {"answer": "1072", "solution": SOLUTION}),
    Sample("gsm8k", "demonstrations", GSM8K, {"prompt": [user(QUESTION)], "completion": [said(SOLUTION)]}),
    Sample("math", "prompts", MATH, {"prompt": [user(MATH["problem"])]}, {"answer": "\\frac{5}{6}", "level": "Level 1"}),
    Sample("math", "demonstrations", MATH, {"prompt": [user(MATH["problem"])], "completion": [said(MATH["solution"])]}),
    Sample("math", "prompts", {**MATH, "answer": "5/6"}, {"prompt": [user(MATH["problem"])]}, {"answer": "5/6"}),
    Sample("dapo_17k", "prompts", DAPO, {"prompt": [user(DAPO_TEXT)]}, {"answer": "34", "data_source": "math_dapo"}),
    Sample("dapo_17k", "prompts", {**DAPO, "prompt": "Find $x$."}, {"prompt": [user("Find $x$.")]}, {"answer": "34"}),
    Sample("verl", "prompts", DAPO, {"prompt": [user(DAPO_TEXT)]}, {"answer": "34", "extra_info": {"index": "9a9b6eb4"}}),
    Sample("deepscaler", "prompts", DEEPSCALER, {"prompt": [user("Compute $2+2$.")]}, {"answer": "4"}),
    Sample("deepscaler", "prompts", {**DEEPSCALER, "solution": ""}, {"prompt": [user("Compute $2+2$.")]}, {"answer": "4"}),
    Sample(
        "deepscaler", "demonstrations", DEEPSCALER,
        {"prompt": [user("Compute $2+2$.")], "completion": [said("It is $4$.")]},
    ),
    Sample("ultrafeedback", "preferences", BINARIZED, {**ASKED, **PAIR}, {"score": 8.5, "prompt_id": "ab12"}),
    Sample("ultrafeedback", "preferences", ORIGINAL, {**ASKED, **PAIR}, {"score": 8.5, "source": "evol_instruct"}),
    Sample("ultrafeedback", "feedback", BINARIZED, {**ASKED, **PAIR}, {"label": True}),
    Sample("ultrafeedback", "prompts", BINARIZED, ASKED, {"prompt_id": "ab12"}),
    Sample("ultrafeedback", "prompts", ORIGINAL, ASKED),
    Sample("ultrafeedback", "demonstrations", ORIGINAL, {**ASKED, "completion": PAIR["chosen"]}),
    Sample("ultrafeedback", "demonstrations", BINARIZED, {"messages": BINARIZED["chosen"]}),
    Sample("hh_rlhf", "preferences", HH, {"prompt": HH_PROMPT, **PAIR}),
    Sample("hh_rlhf", "feedback", HH, {"prompt": HH_PROMPT, **PAIR}, {"label": True}),
    Sample("hh_rlhf", "prompts", HH, {"prompt": HH_PROMPT}),
    Sample("tulu3_sft", "demonstrations", TULU, {"messages": TULU["messages"]}, {"source": "ai2"}),
    Sample("tulu3_sft", "prompts", TULU, {"prompt": TULU["messages"][:3]}),
    Sample("tulu3_preference", "preferences", {"id": "p1", **{k: BINARIZED[k] for k in PAIR}}, {**ASKED, **PAIR}, {"id": "p1"}),
    Sample(
        "tulu3_rlvr", "prompts", {"messages": [user("What is it?")], "ground_truth": "42", "dataset": "gsm8k"}, ASKED,
        {"answer": "42", "dataset": "gsm8k"},
    ),
    Sample("sharegpt", "demonstrations", SHAREGPT, {"messages": TULU["messages"]}, {"id": "s1"}),
    Sample(
        "sharegpt", "demonstrations", {**SHAREGPT, "system": "Be brief."},
        {"messages": [system("Be brief."), *TULU["messages"]]}, needs=frozenset({"system"}),
    ),
    Sample("alpaca", "demonstrations", ALPACA, {"prompt": [user("Translate to English.\n\nnaïve café")], "completion": [said("It is Paris.")]}),
    Sample("alpaca", "prompts", {**ALPACA, "input": ""}, {"prompt": [user("Translate to English.")]}),
    Sample(
        "alpaca", "demonstrations", {**ALPACA, "input": "", "history": [["Hello there", "Hi."]], "system": "Be brief."},
        {"messages": [system("Be brief."), user("Hello there"), said("Hi."), user("Translate to English."), said("It is Paris.")]},
        needs=frozenset({"system"}),
    ),
    Sample("anthropic", "demonstrations", ANTHROPIC, {"messages": [user("Hello there"), said("Hi.")]}),
    Sample(
        "anthropic", "demonstrations", ANTHROPIC_TOOLS, {"messages": [system("Be brief."), *CALLED, *RESULT], "tools": [TOOL]},
        needs=frozenset({"system", "tools"}),
    ),
    Sample("openai", "demonstrations", {"messages": TULU["messages"]}, {"messages": TULU["messages"]}),
    Sample(
        "openai", "demonstrations", OPENAI_TOOLS, {"messages": [system("Be brief."), *CALLED, *RESULT], "tools": [TOOL]},
        needs=frozenset({"system", "tools"}),
    ),
    Sample(
        "openai", "demonstrations", OPENAI_FUNCTIONS, {"messages": [*CALLED, *RESULT], "tools": [TOOL]}, needs=frozenset({"tools"})
    ),
    Sample("openai", "preferences", OPENAI_PAIR, {**ASKED, **PAIR}),
    Sample("chatlearn", "preferences", CHATLEARN_PAIR, {**ASKED, **PAIR}, {"score": 0.9}),
    Sample("chatlearn", "demonstrations", {"query": "What is it?", "response": "Paris"}, {**ASKED, "completion": PAIR["chosen"]}),
    Sample("chatlearn", "prompts", {"prompt": "What is it?", "answer": "Paris", "eval_func": "math_rule"}, ASKED, {"answer": "Paris"}),
]  # fmt: skip
"""Every format, in every kind that differs."""
