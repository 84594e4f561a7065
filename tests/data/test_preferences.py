"""Which tokens pairs and feedback have, what they know of their answers, and which rows are refused."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aligner.data.column_addition import write_tokenizer
from aligner.data.preferences import Pair, tokenize_feedback, tokenize_preferences
from aligner.data.prompts import tokenize_prompts
from aligner.data.tokenized_answer import TokenizedAnswer
from tests.data.tokenizer_kinds import KINDS, tokenizer_of

CHAT = [
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "2"},
]
GOOD, BAD = {"role": "assistant", "content": "3"}, {"role": "assistant", "content": "23"}
PAIR = {"prompt": "1+2=", "chosen": "#3", "rejected": "#4"}


def pairs_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    return tokenize_preferences([("p:1", row)], tokenizer, 1000)[0]


def spoken(answered: TokenizedAnswer, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(what is read before the answer, what is trained)."""
    trained = [token for token, on in zip(answered.tokens, answered.mask, strict=True) if on]
    return str(tokenizer.decode(answered.tokens[: answered.prompt_len])), str(tokenizer.decode(trained))


def test_two_texts_are_two_rows_with_one_prompt(characters: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "<bos>1+2=", "chosen": "#3", "rejected": "3<eos>", "answer": "3"}
    (pair,) = pairs_of(row, characters)
    # a character c has the id ord(c) - 27; <bos> is 1, <eos> 2
    assert pair.chosen == TokenizedAnswer((1, 22, 16, 23, 34, 8, 24, 2), (False,) * 5 + (True,) * 3, 5, row)
    assert pair.rejected == TokenizedAnswer((1, 22, 16, 23, 34, 24, 2), (False,) * 5 + (True,) * 2, 5, row)


def test_no_token_reaches_across_the_border(chat: PreTrainedTokenizerBase) -> None:
    (pair,) = pairs_of({"prompt": "4", "chosen": "5", "rejected": "45"}, chat)
    assert chat.convert_ids_to_tokens(list(pair.chosen.tokens)) == ["<s>", "4", "5", "<|end|>"]
    assert chat.convert_ids_to_tokens(list(pair.rejected.tokens)) == ["<s>", "4", "45", "<|end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
        {"prompt": "4", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},  # the question repeated as text
    ],
)
def test_conversations_part_at_their_last_turn(chat: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    (pair,) = pairs_of(row, chat)
    before = chat.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert spoken(pair.chosen, chat) == (before, "3<|end|>")
    assert spoken(pair.rejected, chat) == (before, "23<|end|>")
    assert list(pair.chosen.tokens) == chat.apply_chat_template([*CHAT, GOOD], return_dict=False)
    assert list(pair.rejected.tokens) == chat.apply_chat_template([*CHAT, BAD], return_dict=False)
    assert pair.chosen.fields == pair.rejected.fields == row


@pytest.mark.parametrize("kind", list(KINDS))
def test_pairs_have_the_templates_ids_and_the_rollouts_prompt(kind: str) -> None:
    tokenizer = tokenizer_of(kind, "zephyr")
    asked = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "é"}, CHAT[2]]
    sides = [{"role": "assistant", "content": content} for content in ("Paris is 😀", " no ")]
    (pair,) = pairs_of({"prompt": asked, "chosen": sides[:1], "rejected": sides[1:]}, tokenizer)
    (prompt,) = tokenize_prompts([("p", {"messages": asked})], tokenizer, 1000)
    for side, answer in zip((pair.chosen, pair.rejected), sides, strict=True):
        assert list(side.tokens) == tokenizer.apply_chat_template([*asked, answer], return_dict=False)
        assert (side.asked or side.tokens[: side.prompt_len]) == prompt.tokens
    (pair,) = pairs_of({"prompt": "What is it?", "chosen": " Paris", "rejected": "\nno"}, tokenizer)
    (prompt,) = tokenize_prompts([("p", {"prompt": "What is it?"})], tokenizer, 1000)
    assert (
        pair.chosen.tokens[: pair.chosen.prompt_len]
        == pair.rejected.tokens[: pair.rejected.prompt_len]
        == prompt.tokens
    )


def test_scored_answers_make_every_pair_of_unequal_scores(characters: PreTrainedTokenizerBase) -> None:
    row = {"query": "1+2=", "response": ["#3", "#4", "3", "#5"], "score": [2, 0.5, 1, 0.5]}
    pairs, left_out = tokenize_preferences([("p:1", row), ("p:2", {**row, "score": [1, 1, 1, 1]})], characters, 1000)
    told = [(spoken(p.chosen, characters)[1], spoken(p.rejected, characters)[1]) for p in pairs]
    wanted = [("#3", "#4"), ("#3", "3"), ("#3", "#5"), ("3", "#4"), ("3", "#5")]
    assert told == [(f"{chosen}<eos>", f"{rejected}<eos>") for chosen, rejected in wanted]
    scores = [(p.chosen.fields["score"], p.rejected.fields["score"]) for p in pairs]
    assert scores == [(2, 0.5), (2, 1), (2, 0.5), (1, 0.5), (1, 0.5)]
    assert [(p.chosen.index, p.rejected.index) for p in pairs] == [(i, i) for i in range(5)]
    assert pairs[0].chosen.fields == {**row, "score": 2.0}
    assert left_out == {"equal scores": 1 + 6}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_each_unequal_pair_comes_once(tmp_path_factory: pytest.TempPathFactory, scores: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp() / "letters"
    if not folder.exists():
        write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    row = {"query": "q", "response": list("abcdef"[: len(scores)]), "score": scores}
    keep = {"prompt": "q", "chosen": "y", "rejected": "z"}  # a file of ties alone is refused
    pairs, left_out = tokenize_preferences([("p:1", row), ("p:2", keep)], tokenizer, 100)
    found = {(spoken(p.chosen, tokenizer)[1][0], spoken(p.rejected, tokenizer)[1][0]) for p in pairs[:-1]}
    score_of = dict(zip("abcdef", scores, strict=False))
    assert len(found) == len(pairs) - 1
    assert all(score_of[a] > score_of[b] for a, b in found)
    ties = sum(a == b for a, b in combinations(scores, 2))
    assert left_out["equal scores"] == ties
    assert len(found) == len(scores) * (len(scores) - 1) // 2 - ties


def test_scores_of_two_answers_reach_their_rows(characters: PreTrainedTokenizerBase) -> None:
    (pair,) = pairs_of({**PAIR, "score_chosen": 8, "score_rejected": 2.5}, characters)
    assert (pair.chosen.fields["score"], pair.rejected.fields["score"]) == (8.0, 2.5)


def test_pairs_that_are_too_long_are_dropped_and_counted(characters: PreTrainedTokenizerBase) -> None:
    rows = [
        ("p:1", {"prompt": "a", "chosen": "b" * 9, "rejected": "c"}),
        ("p:2", PAIR),
        ("p:3", {"prompt": "a", "chosen": "b", "rejected": "c" * 9}),
        ("p:4", {"prompt": "abc", "chosen": "b", "rejected": "c"}),
    ]
    pairs, left_out = tokenize_preferences(rows, characters, 7, "drop")
    assert [(pair.chosen.prompt_len, pair.chosen.index) for pair in pairs] == [(4, 0), (3, 1)]
    assert left_out == {"too long": 2}
    with pytest.raises(ValueError, match=r"no pair is left .too long: 4.; raise data\.max_tokens=3"):
        tokenize_preferences(rows, characters, 3, "drop")
    with pytest.raises(ValueError, match=r"^p:3: an answer with its prompt has 11 tokens, .* raise it to 11"):
        tokenize_preferences(rows[1:], characters, 7)
    ties = [("p:1", {"query": "a", "response": ["b", "c"], "score": [1, 1]})]
    with pytest.raises(ValueError, match=r"no pair is left .equal scores: 1."):
        tokenize_preferences(ties, characters, 7)


SCORED = {"query": "a", "response": ["b", "c"], "score": [1, 2]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "a row is one of .*this row has .'chosen', 'prompt'."),
        ({**PAIR, **SCORED}, "a row is one of"),
        ({"chosen": "a b", "rejected": "a c"}, "'prompt' may only be omitted if"),
        ({**PAIR, "rejected": ""}, "'rejected' is empty"),
        ({**PAIR, "prompt": " "}, "'prompt' is empty"),
        ({**PAIR, "chosen": 3}, "'chosen' must be text, not int"),
        ({**PAIR, "rejected": "#3"}, "chosen and rejected are the same 8 tokens"),
        ({**PAIR, "rejected": "#3<|end|>"}, "chosen and rejected are the same 8 tokens"),
        ({"prompt": CHAT, "chosen": "b", "rejected": [BAD]}, "'prompt' must be text, not list .messages: give"),
        (
            {"prompt": CHAT, "chosen": [GOOD], "rejected": [CHAT[0]]},
            "'rejected' must begin and end with an assistant turn",
        ),
        ({"prompt": CHAT[:2], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' ends with an assistant turn"),
        ({"chosen": [*CHAT, GOOD], "rejected": [*CHAT, GOOD]}, "these diverge at message 4"),
        ({"chosen": [*CHAT, GOOD], "rejected": CHAT[:2]}, "these diverge at message 2"),
        ({"chosen": [CHAT[0], GOOD], "rejected": [CHAT[2], BAD]}, "these diverge at message 0"),
        ({"chosen": [*CHAT, GOOD], "rejected": ["no"]}, r"rejected\[0\] must have 'role' and 'content'"),
        ({**PAIR, "score_chosen": 1, "score_rejected": 2}, "'score_chosen' 1.0 is below 'score_rejected' 2.0"),
        ({**PAIR, "score_chosen": "1", "score_rejected": 2}, "'score_chosen' must be a finite number, not '1'"),
        ({**SCORED, "score": [1]}, "'response' and 'score' must be lists of one length, 2 or more"),
        ({**SCORED, "response": "bc"}, "'response' and 'score' must be lists of one length, 2 or more"),
        ({**SCORED, "score": [1, float("nan")]}, r"score\[1\] must be a finite number, not nan"),
        ({**SCORED, "score": [True, 2]}, r"score\[0\] must be a finite number, not True"),
        ({**SCORED, "score": [1, 10**400]}, r"score\[1\] must be a finite number, not inf"),
        ({**SCORED, "response": ["b", " "]}, r"'response\[1\]' is empty"),
        ({**SCORED, "response": ["b", "b"]}, "chosen and rejected are the same 4 tokens"),
    ],
)
def test_a_bad_pair_is_named(chat: PreTrainedTokenizerBase, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^p\.jsonl:2: .*{reason}"):
        tokenize_preferences([("p.jsonl:1", PAIR), ("p.jsonl:2", row)], chat, 1000)


def test_feedback_keeps_its_label(characters: PreTrainedTokenizerBase) -> None:
    rows = [
        ("f:1", {"prompt": "1+2=", "completion": "#3", "label": True}),
        ("f:2", {"prompt": "1+2=", "completion": "#" * 9, "label": False}),
        ("f:3", PAIR),
    ]
    answers, left_out = tokenize_feedback(rows, characters, 10, "drop")
    told = [(*spoken(a, characters), a.fields["label"], a.index) for a in answers]
    assert told == [
        ("1+2=", "#3<eos>", True, 0),
        ("1+2=", "#3<eos>", True, 1),
        ("1+2=", "#4<eos>", False, 2),
    ]
    assert answers[2].fields == {**PAIR, "label": False}
    assert left_out == {"too long": 1}
    with pytest.raises(ValueError, match=r"no answer is left .too long: 4.; raise data\.max_tokens=2"):
        tokenize_feedback(rows, characters, 2, "drop")


def test_feedback_on_a_conversation(chat: PreTrainedTokenizerBase) -> None:
    row = {"prompt": CHAT, "completion": [GOOD], "label": False}
    ((answered,), _) = tokenize_feedback([("f:1", row)], chat, 100)
    assert spoken(answered, chat)[1] == "3<|end|>"
    assert list(answered.tokens) == chat.apply_chat_template([*CHAT, GOOD], return_dict=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "'label' must be true or false, not None"),
        ({"prompt": "a", "completion": "b", "label": 1}, "'label' must be true or false, not 1"),
        ({"completion": "b", "label": True}, "feedback is one of .*this row has .'completion', 'label'."),
        ({**PAIR, "label": True}, "feedback is one of"),
        (SCORED, "feedback is one of .*this row has .'query', 'response', 'score'."),
        ({"text": "a"}, "a row is one of .'prompt', 'completion', 'label'"),
        ({"prompt": "a", "completion": "b" * 9, "label": True}, "has 11 tokens, more than"),
    ],
)
def test_bad_feedback_is_named(characters: PreTrainedTokenizerBase, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^f\.jsonl:2: .*{reason}"):
        tokenize_feedback([("f.jsonl:1", PAIR), ("f.jsonl:2", row)], characters, 10)
