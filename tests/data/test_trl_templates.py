"""Chat templates of well-known model families, as TRL ships them: ids are the template's, trained tokens TRL's but for white
space and the generation prompt; conversations of tool calls as OpenAI and Anthropic write them are taken in the form that each
template knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from aligner.data.demonstrations import tokenize_demonstrations
from tests.data.format_rows import CALLED, RESULT, TOOL, TULU, said, system, user
from tests.data.test_formats import quiet, trl_sft  # noqa: F401
from tests.data.tokenizer_kinds import trained_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
SPECIAL = re.compile(r"<[|｜][^|｜<>]+[|｜]>|<(?:start|end)_of_turn>")
ENDS = {
    "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "phi3": "<|end|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>",
    "glm4moe": "<|user|>", "cohere": "<|END_OF_TURN_TOKEN|>", "gptoss": "<|return|>",
    "deepseekv3": "<｜end▁of▁sentence｜>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
}  # fmt: skip
"""Family -> end token; <|im_end|> of the others."""
TRAINED = ("qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "glm4moe", "cohere")
CALLING = (
    "qwen2_5",
    "qwen3",
    "qwen3_vl",
    "qwen3_5_think",
    "llama3_1",
    "gptoss",
    "glm4moe",
    "deepseekv3",
    "deepseek_r1_distill",
)


def tokenizer_with(file: str) -> PreTrainedTokenizerFast:
    template = (FOLDER / f"{file}.jinja").read_text(encoding="utf-8")
    made = Tokenizer.from_str(trained_tokenizer("byte_level"))
    made.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in sorted(set(SPECIAL.findall(template)))]
    )
    end = ENDS.get(file.removesuffix("_training"), "<|im_end|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=end, pad_token=end, chat_template=template
    )


def demonstrations(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    return tokenize_demonstrations([("r:1", row)], tokenizer, 5000)[0]


@pytest.mark.parametrize("family", TRAINED)
def test_trained_tokens_are_trl_s(family: str) -> None:
    tokenizer = tokenizer_with(f"{family}_training")
    row = {"messages": TULU["messages"]}
    (made,) = demonstrations(row, tokenizer)
    ids, trained = trl_sft(row, tokenizer)
    assert list(made.tokens) == ids
    assert not [place for place, on in enumerate(made.mask) if on and not trained[place]]
    more = [token for token, ours, theirs in zip(ids, made.mask, trained, strict=True) if theirs and not ours]
    assert not tokenizer.decode(more).strip()


@pytest.mark.parametrize("content", [None, "", "left out"])
@pytest.mark.parametrize("as_text", [False, True], ids=["object", "text"])
@pytest.mark.parametrize("family", CALLING)
def test_calls_are_trained_in_the_form_that_the_template_takes(family: str, as_text: bool, content: str | None) -> None:
    tokenizer = tokenizer_with(family)
    call = {"name": "weather", "arguments": json.dumps({"city": "Oslo"}) if as_text else {"city": "Oslo"}}
    turn = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
    }
    if content == "left out":
        del turn["content"]
    result = {**RESULT[0], "tool_call_id": "call00001"}
    rows = demonstrations(
        {"messages": [system("Be brief."), CALLED[0], turn, result, RESULT[1]], "tools": [TOOL]}, tokenizer
    )
    trained = "".join(
        tokenizer.decode([token for token, on in zip(row.tokens, row.mask, strict=True) if on]) for row in rows
    )
    assert "weather" in trained and "Oslo" in trained and "It is 3.14" in trained
    assert "None" not in trained and "null" not in trained and "\\" not in trained


def test_calls_that_the_template_drops_are_refused_though_tools_name_them() -> None:
    for content in (None, ""):
        messages = [
            user("What is it?"),
            {"role": "assistant", "content": content, "tool_calls": CALLED[1]["tool_calls"]},
        ]
        with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not render 'tool_calls'"):
            demonstrations({"messages": messages, "tools": [TOOL]}, tokenizer_with("lfm2"))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("family", ["qwen3", "gptoss"])
def test_reasoning_reaches_the_template_under_its_own_key(family: str, key: str) -> None:
    (made,) = demonstrations({"messages": [user("2+2?"), {**said("4."), key: "two and two"}]}, tokenizer_with(family))
    trained = [token for token, on in zip(made.tokens, made.mask, strict=True) if on]
    assert "two and two" in tokenizer_with(family).decode(trained)


def test_reasoning_that_no_key_of_the_template_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="the chat template does not render 'thinking'"):
        demonstrations({"messages": [user("2+2?"), {**said("4."), "thinking": "two"}]}, tokenizer_with("phi3"))
