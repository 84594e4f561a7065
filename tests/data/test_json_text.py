"""Lists and objects in columns of JSON text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligner.data.config import DataConfig
from aligner.data.formats import converted
from aligner.data.json_text import parsed, with_conversations
from aligner.data.prompts import Prompt
from aligner.data.sets import read_sets
from aligner.data.tokenized_answer import TokenizedAnswer
from tests.data.format_rows import ALPACA, ANTHROPIC, DAPO, SHAREGPT, TULU, said, system, user
from tests.data.tokenizer_kinds import tokenizer_of


def read(row: dict[str, Any], folder: Path, **settings: Any) -> Any:
    """What one row of a parquet file becomes."""
    pq.write_table(pa.Table.from_pylist([row]), folder / "r.parquet")
    options = {"max_prompt_tokens": 1000, "max_tokens": 2000, "prompts_per_step": 1, **settings}
    tokenizer = tokenizer_of("byte_level", "chatml")
    (made,) = read_sets(DataConfig(path=str(folder / "r.parquet"), **options), tokenizer).training  # type: ignore[misc]
    return made


@pytest.mark.parametrize("text", ["[1", "7", "null", '"[]"', "plain", "[" * 100_000, ""])
def test_other_text_stays(text: str) -> None:
    assert parsed(text) == text


def test_lists_and_objects_are_read() -> None:
    assert parsed(' [1, {"a": null}]') == [1, {"a": None}] and parsed("{}") == {} and parsed(3) == 3


@pytest.mark.parametrize(
    "prompt",
    [
        "[3, 1, 2]", "[]", '[{"a": 1}]', '{"role": "user"}', '["a"]', '[{"name": "Ada", "role": "author"}]',
        '[{"from": "Oslo", "to": "Bergen"}]',
    ],
)  # fmt: skip
def test_a_prompt_that_is_json_but_no_conversation_stays_text(prompt: str) -> None:
    assert with_conversations({"prompt": prompt, "answer": '[{"role": "user"}]'}) == {
        "prompt": prompt,
        "answer": '[{"role": "user"}]',
    }


@pytest.mark.parametrize(
    ("format_name", "row", "column"),
    [(None, TULU, "messages"), ("tulu3_sft", TULU, "messages"), ("sharegpt", SHAREGPT, "conversations")],
)
def test_a_conversation_as_text_is_one(format_name: str | None, row: Any, column: str, tmp_path: Path) -> None:
    as_text = {**row, column: json.dumps(row[column])}
    made = [read(r, tmp_path, kind="demonstrations", format=format_name) for r in (row, as_text)]
    assert isinstance(made[0], TokenizedAnswer) and (made[0].tokens, made[0].mask) == (made[1].tokens, made[1].mask)


def test_both_parts_as_text(tmp_path: Path) -> None:
    row = {"prompt": json.dumps([user("What is it?")]), "completion": json.dumps([said("Paris")])}
    lists = {"prompt": [user("What is it?")], "completion": [said("Paris")]}
    texts, wanted = (read(r, tmp_path, kind="demonstrations") for r in (row, lists))
    assert (texts.tokens, texts.mask) == (wanted.tokens, wanted.mask)


def test_objects_of_a_format_as_text(tmp_path: Path) -> None:
    made = read({**DAPO, "reward_model": json.dumps(DAPO["reward_model"])}, tmp_path, kind="prompts", format="dapo_17k")
    assert isinstance(made, Prompt) and made.fields["answer"] == "34"
    blocks = [{**turn, "content": json.dumps(turn["content"])} for turn in ANTHROPIC["messages"]]
    blocks[0]["content"] = ANTHROPIC["messages"][0]["content"]
    made = read({"messages": blocks}, tmp_path, kind="demonstrations", format="anthropic")
    assert made.tokens == read({"messages": [user("Hello there"), said("Hi.")]}, tmp_path, kind="demonstrations").tokens


@pytest.mark.parametrize("content", ["[1, 2]", '["a"]', '{"type": "text"}', "[]", '[{"a": 1}]'])
def test_what_an_anthropic_turn_says_may_be_json(content: str, tmp_path: Path) -> None:
    row = {"messages": [user(content), said(content)]}
    made, wanted = (read(row, tmp_path, kind="demonstrations", format=name) for name in ("anthropic", None))
    assert (made.tokens, made.mask) == (wanted.tokens, wanted.mask)


def test_blocks_of_a_system_prompt_as_text(tmp_path: Path) -> None:
    row = {**ANTHROPIC, "system": [{"type": "text", "text": "Be brief."}]}
    as_text = {**row, "system": json.dumps(row["system"])}
    made, wanted = (converted(r, "r:1", "anthropic", "demonstrations", True) for r in (as_text, row))
    assert made == wanted and wanted["messages"][0] == system("Be brief.")


def test_the_history_of_alpaca_as_text(tmp_path: Path) -> None:
    row = {**ALPACA, "history": [["Hello", "Hi."]]}
    made, wanted = (
        converted({**row, "history": history}, "r:1", "alpaca", "demonstrations", True)
        for history in (json.dumps(row["history"]), row["history"])
    )
    assert made == wanted and len(made["messages"]) == 4
    for none in ("[]", "", [], None):
        assert converted({**row, "history": none}, "r:1", "alpaca", "demonstrations", False)["completion"]
    with pytest.raises(ValueError, match="r:1: column 'history' must be a list, not 3"):
        converted({**row, "history": 3}, "r:1", "alpaca", "demonstrations", True)


def test_calls_and_functions_of_openai_as_text() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    functions = [{"name": "weather", "parameters": {"type": "object"}}]

    def row(calls: Any, defined: Any) -> dict[str, Any]:
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        return converted(
            {"messages": [user("Rain?"), answer], "functions": defined}, "r:1", "openai", "demonstrations", True
        )

    wanted = row([call], functions)
    assert wanted["tools"] == [{"type": "function", "function": functions[0]}]
    inner = {**call, "function": json.dumps(call["function"])}
    for calls in (json.dumps([call]), [json.dumps(call)], [inner]):
        assert row(calls, json.dumps(functions)) == wanted
    with pytest.raises(ValueError, match=r"functions\[0\] must be an object, not 'weather'"):
        row([call], ["weather"])


def test_a_path_leads_into_text(tmp_path: Path) -> None:
    row = {"extra": json.dumps({"q": "What is it?", "a": ["Paris"]})}
    made = read(row, tmp_path, kind="demonstrations", columns={"prompt": "extra.q", "completion": "extra.a[0]"})
    assert made.fields["prompt"] == "What is it?" and made.fields["completion"] == "Paris"


def test_a_list_of_messages_is_a_prompt(tmp_path: Path) -> None:
    """TRL's prompt-only type."""
    made, wanted = (
        read({name: [user("What is it?")], "answer": "4"}, tmp_path, kind="prompts") for name in ("prompt", "messages")
    )
    assert made == wanted and made.fields == {"messages": [user("What is it?")], "answer": "4"}
