"""Prompts from rows, and their errors."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.prompts import PromptTokenizer, tokenize_prompts
from aligner.data.row_tokenizer import RowTooLongError, tokenize_rows


def test_text_prompts(characters: PreTrainedTokenizerBase) -> None:
    rows = [("p:1", {"prompt": "<bos>1+2=", "answer": "3"}), ("p:2", {"prompt": "ab"})]
    first, second = tokenize_prompts(rows, characters, 5)
    assert characters.convert_ids_to_tokens(list(first.tokens)) == ["<bos>", "1", "+", "2", "="]
    assert (first.text, first.index, first.fields) == ("<bos>1+2=", 0, {"prompt": "<bos>1+2=", "answer": "3"})
    assert (second.text, second.index, len(second.tokens)) == ("ab", 1, 2)


def test_conversations_go_through_the_chat_template_once(chat: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "45"}]
    (prompt,) = tokenize_prompts([("p:1", {"messages": messages})], chat, 100)
    assert prompt.text == "<|start|>system\nS<|end|>\n<|start|>user\n45<|end|>\n<|start|>assistant\n"
    assert list(prompt.tokens) == chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert 0 not in prompt.tokens


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' must be text, not int"),
        ({"prompt": []}, "'prompt' must be a list such as"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] must have 'role' and 'content'"),
        ({"question": "a"}, "needs 'prompt' or 'messages' .one of them.; it has .'question'."),
        ({"prompt": "a", "messages": []}, "one of them"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "hello"}, "'messages' must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must have"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}, r"messages\[1\] must have"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] must have"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "ends with an assistant turn"),
        ({"prompt": "a" * 9}, r"has 9 tokens, more than data\.max_prompt_tokens=8; raise it to 9"),
    ],
)
def test_a_bad_row_is_named(characters: PreTrainedTokenizerBase, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^p\.jsonl:2: .*{reason}"):
        tokenize_prompts([("p.jsonl:1", {"prompt": "a" * 8}), ("p.jsonl:2", row)], characters, 8)


def test_prompts_that_are_too_long_are_dropped_and_counted(characters: PreTrainedTokenizerBase) -> None:
    rows: list[tuple[str, dict[str, Any]]] = [(f"p:{n}", {"prompt": "a" * n}) for n in (3, 9, 8, 12)]
    tokenize = PromptTokenizer(characters, 8, "drop")
    kept = tokenize_rows(rows, tokenize)
    assert ([len(prompt.tokens) for prompt in kept], [prompt.index for prompt in kept]) == ([3, 8], [0, 1])
    assert tokenize.left_out == {"too long": 2}
    with pytest.raises(ValueError, match=r"^no prompt is left .too long: 4.; raise data\.max_prompt_tokens=2, or"):
        tokenize_rows(rows, PromptTokenizer(characters, 2, "drop"))
    for stop in ("error", "stop"):
        with pytest.raises(RowTooLongError, match=r"^p:9: the prompt has 9 tokens, .* data\.too_long=drop"):
            tokenize_rows(rows, PromptTokenizer(characters, 8, stop))
    with pytest.raises(ValueError, match=r"data\.too_long=cut is unknown; use error or drop"):
        PromptTokenizer(characters, 8, "cut")
