"""Which tokens a demonstration has and which of them are trained."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.demonstrations import Demonstration, DemonstrationStream, tokenize_demonstrations


def one(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Demonstration:
    (demonstration,), dropped = tokenize_demonstrations([("d:1", row)], tokenizer, 1000)
    assert dropped == 0
    assert len(demonstration.tokens) == len(demonstration.mask)
    return demonstration


def texts(demonstration: Demonstration, tokenizer: PreTrainedTokenizerBase) -> list[tuple[bool, str]]:
    """Runs of equal mask, decoded."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(demonstration.tokens, demonstration.mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return [(trained, str(tokenizer.decode(tokens))) for trained, tokens in runs]


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("query", "response")])
def test_a_pair_trains_the_completion_and_its_end_token(
    characters: PreTrainedTokenizerBase, keys: tuple[str, str]
) -> None:
    row = {keys[0]: "<bos>1+2=", keys[1]: "#3", "answer": "3"}
    demonstration = one(row, characters)
    assert texts(demonstration, characters) == [(False, "<bos>1+2="), (True, "#3<eos>")]
    assert (demonstration.prompt_len, demonstration.fields) == (5, row)


def test_an_end_token_already_written_is_not_doubled(characters: PreTrainedTokenizerBase) -> None:
    assert texts(one({"prompt": "a", "completion": "b<eos>"}, characters), characters)[1] == (True, "b<eos>")


def test_no_token_reaches_across_the_border(chat: PreTrainedTokenizerBase) -> None:
    """As one text "45" is one token; the policy meets "4" and must produce "5"."""
    demonstration = one({"prompt": "4", "completion": "545"}, chat)
    assert chat.convert_ids_to_tokens(list(demonstration.tokens)) == ["<s>", "4", "5", "45", "<|end|>"]
    assert demonstration.mask == (False, False, True, True, True)


def test_every_assistants_turn_is_trained_up_to_its_end_token(chat: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "4"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "3"},
    ]
    demonstration = one({"messages": messages}, chat)
    assert texts(demonstration, chat) == [
        (False, "<|start|>user\n4<|end|>\n<|start|>assistant\n"),
        (True, "5<|end|>"),
        (False, "\n<|start|>user\n2<|end|>\n<|start|>assistant\n"),
        (True, "3<|end|>"),
        (False, "\n"),
    ]
    assert list(demonstration.tokens) == chat.apply_chat_template(messages, return_dict=False)


def test_the_character_tokenizers_conversation(characters: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "#3"}]
    assert texts(one({"messages": messages}, characters), characters) == [(False, "<bos>1+2="), (True, "#3<eos>")]


def test_a_template_that_never_ends_a_turn_gets_the_end_token(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert texts(one({"messages": messages}, chat), chat) == [
        (False, "user: a\n"),
        (True, "assistant: b\n<|end|>"),
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template = (
        "{% for m in messages %}{{ '<think>' if loop.last and m['role'] == 'assistant' }}"
        "{{ m['content'] }}<|end|>{% endfor %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert texts(one({"messages": turns}, chat), chat) == [(False, "a<|end|>"), (True, "<think>b<|end|>")]
    with pytest.raises(ValueError, match=r"d:1: the chat template does not write messages\[:2\] as a beginning"):
        one({"messages": turns + turns}, chat)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "is one of .*this row has .'prompt'."),
        ({"prompt": "a", "completion": "b", "messages": []}, "is one of"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": " ", "completion": "b"}, "'prompt' is empty"),
        ({"query": "a", "response": 3}, "'response' must be text, not int"),
        ({"messages": "a"}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "end with an assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begin with another's turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            r"messages\[1\] is an assistant's turn with an empty",
        ),
        ({"prompt": "a" * 6, "completion": "b"}, r"has 8 tokens, more than data\.max_tokens=7; raise it to 8"),
    ],
)
def test_a_bad_row_is_named(characters: PreTrainedTokenizerBase, row: dict[str, Any], reason: str) -> None:
    rows = [("d.jsonl:1", {"prompt": "aaaaa", "completion": "b"}), ("d.jsonl:2", row)]
    with pytest.raises(ValueError, match=rf"^d\.jsonl:2: .*{reason}"):
        tokenize_demonstrations(rows, characters, 7)


def test_longer_rows_can_be_dropped_and_are_counted(characters: PreTrainedTokenizerBase) -> None:
    rows = [(f"d:{n}", {"prompt": "a" * n, "completion": "b"}) for n in (9, 1, 8, 2)]
    kept, dropped = tokenize_demonstrations(rows, characters, 7, too_long="drop")
    assert ([demonstration.prompt_len for demonstration in kept], dropped) == ([1, 2], 2)
    with pytest.raises(ValueError, match=r"all 4 demonstrations are longer than data\.max_tokens=2"):
        tokenize_demonstrations(rows, characters, 2, too_long="drop")
    with pytest.raises(ValueError, match=r"data\.too_long='cut' is unknown; use error or drop"):
        tokenize_demonstrations(rows, characters, 7, too_long="cut")  # type: ignore[arg-type]


def test_the_stream_deals_batches_of_any_size(characters: PreTrainedTokenizerBase) -> None:
    rows = [(f"d:{n}", {"prompt": "a" * n, "completion": "b"}) for n in range(1, 6)]
    stream = DemonstrationStream(tokenize_demonstrations(rows, characters, 20)[0], seed=0)
    lengths = [demonstration.prompt_len for count in (2, 3, 4, 1) for demonstration in stream.next(count)]
    assert sorted(lengths[:5]) == sorted(lengths[5:]) == [1, 2, 3, 4, 5]
