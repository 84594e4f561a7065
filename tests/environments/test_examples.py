"""The examples of docs/agents.md: what is demonstrated is what is sampled, and the tools do what they say."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.column_addition import write_tokenizer
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.tokenizer import load_tokenizer
from aligner.environments.conversation import Conversation, ConversationFormat
from aligner.environments.tool_calls import call_message, pythonic

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path)
    made = load_tokenizer(tmp_path)
    made.chat_template = example("calculator").CHAT_TEMPLATE
    return made


@pytest.mark.parametrize("tools", [True, False])
def test_a_demonstration_of_the_calculator_is_an_episode_token_by_token(tokenizer: Any, tools: bool) -> None:
    calculator = example("calculator")
    messages = calculator.demonstration(*calculator.task(random.Random(1)), tools=tools)
    ((row,), _) = tokenize_demonstrations([("d", {"messages": messages})], tokenizer, 128)
    form, desk = ConversationFormat(tokenizer, [tokenizer.eos_token_id]), calculator.Calculator()
    conversation = Conversation(form)
    ids = list(conversation.open(messages[:1]))
    turns = 0
    while len(ids) < len(row.tokens):
        assert ids == list(row.tokens[: len(ids)])
        end = row.tokens.index(tokenizer.eos_token_id, len(ids)) + 1
        sampled = row.tokens[len(ids) : end]
        assert all(row.mask[len(ids) : end])
        turns += 1
        text = tokenizer.decode(sampled[:-1])
        parsed = pythonic(text)
        if not parsed.calls:
            ids = [*ids, *sampled]
            continue
        (call,) = parsed.calls
        result = {"role": "tool", "content": str(getattr(desk, call.name)(**call.arguments))}
        ids = list(conversation.extend(sampled, call_message(parsed, text, ["call00100"]), [result]).ids)
    assert ids == list(row.tokens)
    assert turns == (4 if tools else 1)
    assert tokenizer.decode(ids[:-1]).endswith(messages[-1]["content"])


def test_the_search_ranks_documents_by_rare_words(tmp_path: Path) -> None:
    texts = {
        "Oslo": "Oslo is the capital of Norway.",
        "Bergen": "Bergen is rainy, and in Norway.",
        "Paris": "Paris is in France.",
    }
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in texts.items()))
    search = example("search").Search(str(file), results=2).search
    assert search("The capital of Norway?") == f"Oslo\n{texts['Oslo']}\n\nBergen\n{texts['Bergen']}"
    assert search("Paris") == f"Paris\n{texts['Paris']}"
    assert search("Lima") == "Nothing was found."
