"""Which tokens a demonstration has and which of them are trained."""

from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.data.answers import SPLIT
from aligner.data.demonstrations import tokenize_demonstrations
from aligner.data.tokenized_answer import TokenizedAnswer


def one(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenizedAnswer:
    (demonstration,), dropped = tokenize_demonstrations([("d:1", row)], tokenizer, 1000)
    assert dropped == 0
    assert len(demonstration.tokens) == len(demonstration.mask)
    return demonstration


def texts(demonstration: TokenizedAnswer, tokenizer: PreTrainedTokenizerBase) -> list[tuple[bool, str]]:
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


REWRITES = "{% for m in messages %}{{ '<think>' if loop.last and m['role'] == 'assistant' }}{{ m['content'] }}<|end|>{% endfor %}"


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template = REWRITES
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert texts(one({"messages": turns}, chat), chat) == [(False, "a<|end|>"), (True, "<think>b<|end|>")]
    row = {"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    notes: Counter[str] = Counter()
    rows, dropped = tokenize_demonstrations([("d:1", row), ("d:2", {"messages": turns})], chat, 99, notes=notes)
    assert [texts(found, chat) for found in rows] == [
        [(False, "a<|end|>"), (True, "<think>b<|end|>")],
        [(False, "a<|end|>b<|end|>c<|end|>"), (True, "<think>d<|end|>")],
        [(False, "a<|end|>"), (True, "<think>b<|end|>")],
    ]
    assert [(found.index, found.fields) for found in rows] == [(0, row), (1, row), (2, {"messages": turns})]
    assert (dropped, notes) == (0, {SPLIT: 1})
    assert len(tokenize_demonstrations([("d:1", row)], chat, 12, "drop")[0]) == 1, "each is dropped by itself"
    with pytest.raises(ValueError, match=r"d:1: the chat template .*messages\[1\] as a prefix.*train_on=responses"):
        tokenize_demonstrations([("d:1", row)], chat, 99, train_on="all")


CHAT = [
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "3"},
]
U1, A1 = "<|start|>user\n4<|end|>\n<|start|>assistant\n", "5<|end|>"
U2, A2 = "\n<|start|>user\n2<|end|>\n<|start|>assistant\n", "3<|end|>"


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("query", "response")])
def test_messages_after_messages_train_the_completions_turns_only(
    chat: PreTrainedTokenizerBase, keys: tuple[str, str]
) -> None:
    demonstration = one({keys[0]: CHAT[:3], keys[1]: CHAT[3:]}, chat)
    assert texts(demonstration, chat) == [(False, U1 + A1 + U2), (True, A2), (False, "\n")]
    assert list(demonstration.tokens) == chat.apply_chat_template(CHAT, return_dict=False)
    assert demonstration.prompt_len == len(
        chat.apply_chat_template(CHAT[:3], add_generation_prompt=True, return_dict=False)
    )
    both = one({keys[0]: CHAT[:1], keys[1]: CHAT[1:]}, chat)
    assert texts(both, chat) == [(False, U1), (True, A1), (False, U2), (True, A2), (False, "\n")]


def test_a_prompts_turns_may_be_written_otherwise_once_they_are_past(chat: PreTrainedTokenizerBase) -> None:
    """They are only read, as the template writes them before the completion."""
    chat.chat_template = REWRITES
    demonstration = one({"prompt": CHAT[:3], "completion": CHAT[3:]}, chat)
    assert texts(demonstration, chat) == [(False, "4<|end|>5<|end|>2<|end|>"), (True, "<think>3<|end|>")]
    untrained = [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]
    assert one({"messages": untrained}, chat).mask == demonstration.mask


@pytest.mark.parametrize(
    ("row", "tokens", "mask"),
    [
        # <bos> 1 + 2 = | # 3 <eos>: a character c has the id ord(c) - 27, <bos> 1, <eos> 2
        ({"prompt": "<bos>1+2=", "completion": "#3"}, (1, 22, 16, 23, 34, 8, 24, 2), "01111111"),
        ({"query": "1+2=", "response": "#3"}, (22, 16, 23, 34, 8, 24, 2), "0111111"),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
            (1, 22, 23, 2),
            "0111",
        ),
        (
            {"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "2"}]},
            (1, 22, 23, 2),
            "0111",
        ),
    ],
)
def test_all_tokens_but_the_first_can_be_trained(
    characters: PreTrainedTokenizerBase, row: dict[str, Any], tokens: tuple[int, ...], mask: str
) -> None:
    (everything,), _ = tokenize_demonstrations([("d:1", row)], characters, 1000, train_on="all")
    answer = one(row, characters)
    assert everything.tokens == answer.tokens == tokens
    assert everything.mask == tuple(bit == "1" for bit in mask)
    assert everything.prompt_len == answer.prompt_len == answer.mask.index(True)


@pytest.mark.parametrize("switch", [{"train": False}, {"weight": 0}, {"weight": 0, "train": False}])
def test_a_turn_that_is_not_to_be_trained_is_only_read(chat: PreTrainedTokenizerBase, switch: dict[str, Any]) -> None:
    first = {"messages": [CHAT[0], {**CHAT[1], **switch}, *CHAT[2:]]}
    assert texts(one(first, chat), chat) == [(False, U1 + A1 + U2), (True, A2), (False, "\n")]
    last = {"messages": [*CHAT[:3], {**CHAT[3], **switch}]}
    assert texts(one(last, chat), chat) == [(False, U1), (True, A1), (False, "\n")]  # what follows teaches nothing
    in_prompt = {"prompt": [CHAT[0], {**CHAT[1], **switch}, CHAT[2]], "completion": [{**CHAT[3], "train": True}]}
    assert one(in_prompt, chat).mask == one(first, chat).mask
    (everything,), _ = tokenize_demonstrations([("d:1", first)], chat, 1000, train_on="all")
    assert texts(everything, chat) == [
        (False, "<|start|>"),
        (True, U1.removeprefix("<|start|>")),
        (False, A1),
        (True, U2 + A2 + "\n"),
    ]
    assert everything.prompt_len == one(first, chat).prompt_len
    (everything,), _ = tokenize_demonstrations([("d:1", in_prompt)], chat, 1000, train_on="all")
    assert [text for trained, text in texts(everything, chat) if not trained] == ["<|start|>", A1]


@pytest.mark.parametrize(
    ("place", "switch", "train_on", "reason"),
    [
        (1, {"train": "no"}, "responses", r"messages\[1\]: 'train' must be true or false .or 1 or 0., not 'no'"),
        (1, {"weight": 0.5}, "responses", r"messages\[1\]: 'weight' must be true or false .or 1 or 0., not 0.5"),
        (1, {"weight": 1, "train": False}, "all", r"messages\[1\]: 'train' and 'weight' contradict each other"),
        (0, {"train": True}, "responses", r"messages\[0\] is not an assistant turn .* use data.train_on=all"),
        (0, {"weight": 0}, "all", r"messages\[0\] is not an assistant turn .* use data.train_on=responses"),
        (1, {"train": False}, "all", r"no turn is trained on; remove \"train\" or \"weight\""),
    ],
)
def test_a_switch_that_cannot_be_followed_is_named(
    chat: PreTrainedTokenizerBase, place: int, switch: dict[str, Any], train_on: str, reason: str
) -> None:
    messages = [{**message, **(switch if i == place else {})} for i, message in enumerate(CHAT[:2])]
    with pytest.raises(ValueError, match=rf"^d:1: {reason}"):
        tokenize_demonstrations([("d:1", {"messages": messages})], chat, 1000, train_on=train_on)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "is one of .*this row has .'prompt'."),
        ({"prompt": "a", "completion": "b", "messages": []}, "is one of"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": " ", "completion": "b"}, "'prompt' is empty"),
        ({"query": "a", "response": 3}, "'response' must be text, not int"),
        ({"prompt": "a", "completion": CHAT[1:2]}, "'completion' must be text, not list .messages: give 'prompt' and"),
        ({"prompt": CHAT[:2], "completion": CHAT[3:]}, "'prompt' ends with an assistant turn"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:3]}, "'completion' must begin and end with an assistant turn"),
        ({"prompt": CHAT[:1], "completion": ["5"]}, r"completion\[0\] must have 'role' and 'content' as texts"),
        ({"prompt": [], "completion": CHAT[1:2]}, "'prompt' must be a list such as"),
        ({"messages": "a"}, "'messages' must be a list"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "must not begin with an assistant turn, and must end with one",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must not begin with an assistant turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            r"messages\[1\] is an assistant turn with an empty",
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
    assert ([(demonstration.prompt_len, demonstration.index) for demonstration in kept], dropped) == (
        [(1, 0), (2, 1)],
        2,
    )
    with pytest.raises(ValueError, match=r"no demonstration is left .too long: 4.; raise data\.max_tokens=2"):
        tokenize_demonstrations(rows, characters, 2, too_long="drop")
    with pytest.raises(ValueError, match=r"data\.train_on=prompts is unknown; use responses or all"):
        tokenize_demonstrations(rows, characters, 7, train_on="prompts")
    with pytest.raises(ValueError, match=r"data\.too_long=cut is unknown; use error or drop"):
        tokenize_demonstrations(rows, characters, 7, too_long="cut")
