"""The examples of docs/agents.md: what is demonstrated is what is sampled, and the tools do what they say."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.column_addition import write_tokenizer
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.prompts import Prompt
from aligner.data.tokenizer import load_tokenizer
from aligner.environments.config import EnvironmentConfig
from aligner.environments.conversation import Conversation, ConversationFormat
from aligner.environments.episodes import EnvironmentEpisodes
from aligner.environments.parsers import named_parser
from aligner.environments.pool import EnvironmentPool
from aligner.environments.tool_calls import call_message, pythonic
from aligner.rollout.episodes.source import Ended
from aligner.rollout.requests import Sample

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


def documented(tmp_path: Path, name: str) -> str:
    """The target of a class of docs/agents.md, written to a file."""
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "agents.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f"class {name}:" in block]
    (tmp_path / "my_tools.py").write_text(block)
    return f"{tmp_path / 'my_tools.py'}:{name}"


def played(target: str, turns: list[str], row: dict[str, Any], parser: str, tokenizer: Any) -> tuple[list[str], Ended]:
    """An episode of these turns in environment processes: (the last message before each turn, how it ended)."""
    config = EnvironmentConfig(target, processes=1, tool_parser=parser)
    pool, form = EnvironmentPool(config), ConversationFormat(tokenizer, [tokenizer.eos_token_id])
    source = EnvironmentEpisodes(config, pool, form, lambda: named_parser(parser, tokenizer), 2000)
    heard: list[str] = []
    try:
        source.start(0, Prompt((1,), "", row, 0), seed=342)
        while True:
            for event in source.poll(10.0):
                if isinstance(event, Ended):
                    return heard, event
                heard.append(str(tokenizer.decode(event.context)).rpartition("<eos>")[2])
                sampled = tokenizer.encode(turns[event.turn - 1] + "<eos>", add_special_tokens=False)
                source.answer(0, event.turn, Sample([], 0, sampled, ended=True))
    finally:
        source.close()


def test_the_documented_tools_are_played(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "1+2+4?", "answer": 7}
    turns = ["[add(a=1,b=2)]", "[add(a=3,b=x)]", "[sub(a=3,b=4)]", "[add(a=3,b=4)]", "7"]
    heard, end = played(documented(tmp_path, "Tools"), turns, row, "pythonic", tokenizer)
    assert heard[:3] == ["<bos>1+2+4?\n", "3\n", "Error: tool call 1 must have literals as arguments, not x\n"]
    assert "there is no tool sub" in heard[3]
    assert (heard[4], end.ended, end.reward, len(end.turn_rewards)) == ("7\n", "done", 1.0, 5)
    assert {"malformed_calls": 1.0, "tool_calls": 3.0, "tool_errors": 1.0}.items() <= dict(
        end.record["metrics"]
    ).items()


def test_the_documented_environment_is_played(tmp_path: Path, tokenizer: Any) -> None:
    heard, end = played(documented(tmp_path, "Guess"), ["40", "50", "42"], {"prompt": "Guess."}, "pythonic", tokenizer)
    assert heard == ["<bos>Guess.\n\nI think of a number below 100.\n", "Higher.\n", "Lower.\n"]
    assert (end.ended, end.turn_rewards, end.reward) == ("done", (0.0, 0.0, 1.0), 1.0)
