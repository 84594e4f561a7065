"""What a job reads, by data.kind, from files and from a generated task."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.bounds import check_settings
from aligner.data.answers import SPLIT
from aligner.data.column_addition import ColumnAddition
from aligner.data.config import DataConfig
from aligner.data.preferences import Pair, tokenize_preferences
from aligner.data.prompts import Prompt
from aligner.data.sets import DataSets, prompts_of, read_sets
from aligner.data.streamed import ExampleStream, StreamedExamples
from aligner.data.tokenized_answer import TokenizedAnswer
from tests.data.tokenizer_kinds import tokenizer_of

TASK = ColumnAddition(demonstrations=50, prompts=40, heldout=9, preferences=30)
PAIR = {"prompt": "1+2=", "chosen": "#3", "rejected": "#4"}
LIMITS: dict[str, Any] = {"max_prompt_tokens": 16, "max_tokens": 64, "prompts_per_step": 4}


def file_of(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "form", "count", "heldout", "heldout_pairs", "heldout_answers"),
    [
        ("prompts", Prompt, 40, 5, 0, 0),
        ("demonstrations", TokenizedAnswer, 50, 0, 0, 5),
        ("preferences", Pair, 30, 5, 5, 0),
        ("feedback", TokenizedAnswer, 60, 5, 5, 0),
    ],
)
def test_a_task_gives_every_kind(
    characters: PreTrainedTokenizerBase, kind: str, form: type, count: int, heldout: int, heldout_pairs: int,
    heldout_answers: int,
) -> None:  # fmt: skip
    sets = read_sets(DataConfig(kind=kind, task=TASK, eval_prompts=5, **LIMITS), characters)
    assert {type(row) for row in sets.training} == {form}
    found = (sets.training, sets.heldout, sets.heldout_pairs, sets.heldout_answers)
    assert tuple(map(len, found)) == (count, heldout, heldout_pairs, heldout_answers)


@pytest.mark.parametrize("kind", ["preferences", "feedback"])
def test_files_hold_pairs_to_train_and_to_evaluate_on(
    characters: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    path = file_of(tmp_path, PAIR, {**PAIR, "prompt": "a" * 70}, {**PAIR, "prompt": "2+1="})
    held = file_of(tmp_path, {**PAIR, "prompt": "11+2="})
    limits = {**LIMITS, "prompts_per_step": 2, "too_long": "drop"}
    sets = read_sets(DataConfig(path=path, eval_path=held, kind=kind, **limits), characters)
    assert len(sets.training) == (2 if kind == "preferences" else 4)
    assert sets.left_out == {"too long": 1 if kind == "preferences" else 2}
    (pair,) = sets.heldout_pairs
    assert pair.chosen.prompt_len == 5
    assert read_sets(DataConfig(path=path, kind=kind, **limits), characters).heldout_pairs == []
    too_few = DataConfig(path=path, kind=kind, **{**limits, "prompts_per_step": 9})
    with pytest.raises(ValueError, match=rf"data\.prompts_per_step=9 is more than the [24] rows of data\.path={path}"):
        read_sets(too_few, characters)
    single = file_of(tmp_path, {"prompt": "a", "completion": "b", "label": True})
    with pytest.raises(ValueError, match=rf"^{single}:1: a row is one of .'prompt', 'chosen', 'rejected'"):
        read_sets(DataConfig(path=path, eval_path=single, kind=kind, **limits), characters)


def test_heldout_pairs_give_their_prompts_once(characters: PreTrainedTokenizerBase) -> None:
    conversation = [{"role": "user", "content": "1+2="}]
    asked = [{"role": "user", "content": "1+3="}]
    turns = [[{"role": "assistant", "content": text}] for text in ("#3", "#4")]
    rows: list[dict[str, Any]] = [
        {**PAIR, "prompt": "<bos>2+1=", "answer": "3", "score_chosen": 1, "score_rejected": 0},
        {"query": "7+1=", "response": ["#8", "#9", "8"], "score": [3, 1, 2], "id": 5},
        {"prompt": conversation, "chosen": turns[0], "rejected": turns[1]},
        {"chosen": conversation + turns[0], "rejected": conversation + turns[1]},
        {"prompt": "1+3=", **{side: asked + turn for side, turn in zip(("chosen", "rejected"), turns, strict=True)}},
    ]
    pairs = tokenize_preferences([("p:1", row) for row in rows], characters, 99)[0]
    assert len(pairs) == 7
    prompts = prompts_of(pairs, characters)
    # a character c has the id ord(c) - 27; <bos> is 1, which the chat template writes too
    assert prompts == [
        Prompt((1, 23, 16, 22, 34), "<bos>2+1=", {"prompt": "<bos>2+1=", "answer": "3"}, 0),
        Prompt((28, 16, 22, 34), "7+1=", {"query": "7+1=", "id": 5}, 1),
        Prompt((1, 22, 16, 23, 34), "<bos>1+2=", {"prompt": conversation}, 2),
        Prompt((1, 22, 16, 24, 34), "<bos>1+3=", {"prompt": "1+3="}, 3),
    ]


def test_demonstrations_are_held_out_too(characters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "completion": "2"}
    path, held = (
        file_of(tmp_path, row, row),
        file_of(tmp_path, {**row, "completion": "211"}, {**row, "prompt": "1" * 70}),
    )
    sets = read_sets(
        DataConfig(
            path=path, eval_path=held, kind="demonstrations", **{**LIMITS, "prompts_per_step": 2, "too_long": "drop"}
        ),
        characters,
    )
    (answered,) = sets.heldout_answers
    assert (answered.prompt_len, sum(answered.mask)) == (4, 4), "three characters and the end"


def test_demonstrations_are_trained_on_as_set(characters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "1+2=", "completion": "#3"})
    for train_on, trained in (("responses", 3), ("all", 6)):
        data = DataConfig(path=path, kind="demonstrations", train_on=train_on, **{**LIMITS, "prompts_per_step": 1})
        (row,) = read_sets(data, characters).training
        assert isinstance(row, TokenizedAnswer)
        assert sum(row.mask) == trained


def test_variables_of_the_template_reach_every_set(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", "forgets_thought")
    ask, said = {"role": "user", "content": "a"}, [{"role": "assistant", "content": text} for text in "bc"]
    rows = {
        "prompts": {"messages": [ask]},
        "demonstrations": {"messages": [ask, said[0]]},
        "preferences": {"prompt": [ask], "chosen": said[:1], "rejected": said[1:]},
        "feedback": {"prompt": [ask], "chosen": said[:1], "rejected": said[1:]},
    }
    for kind, row in rows.items():
        path = file_of(tmp_path, row)
        more = {"enable_thinking": False}
        data = DataConfig(
            path=path, eval_path=path, kind=kind, **{**LIMITS, "max_prompt_tokens": 64, "prompts_per_step": 1}
        )
        for given, ends in ((data, "assistant\n"), (replace(data, chat_template_kwargs=more), "</think>\n\n")):
            sets = read_sets(given, tokenizer)
            found = [*sets.training, *sets.heldout, *sets.heldout_pairs, *sets.heldout_answers]
            assert len(found) >= 2
            for one in (one.chosen if isinstance(one, Pair) else one for one in found):
                prompt = one.tokens if isinstance(one, Prompt) else one.tokens[: one.prompt_len]
                assert str(tokenizer.decode(prompt)).endswith(ends), kind
        sets = read_sets(replace(data, system_prompt="Be."), tokenizer)
        for one in (*sets.training, *sets.heldout, *sets.heldout_pairs, *sets.heldout_answers):  # type: ignore[misc]
            tokens = (one.chosen if isinstance(one, Pair) else one).tokens
            assert str(tokenizer.decode(tokens)).startswith("<|im_start|>system\nBe.<|im_end|>"), kind
    with pytest.raises(ValueError, match=r"data\.chat_template_kwargs\.enable_thoughts is not a variable"):
        read_sets(replace(data, chat_template_kwargs={"enable_thoughts": False}), tokenizer)


def test_what_a_reader_should_know_is_counted(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    path = file_of(tmp_path, {"messages": turns * 2}, {"messages": turns})
    data = DataConfig(path=path, kind="demonstrations", **{**LIMITS, "prompts_per_step": 3})
    sets = read_sets(data, tokenizer_of("byte_level", "forgets_thought"))
    assert (len(sets.training), sets.notes) == (3, {SPLIT: 1})


def test_the_longest_answer_may_be_held_out() -> None:
    short, long = (TokenizedAnswer((1,) * n, (False,) * n, 1, {}) for n in (3, 7))
    assert DataSets([short, long]).longest == 7
    assert DataSets([Pair(long, short)]).longest == 7
    assert DataSets([Pair(short, short)], heldout_pairs=[Pair(short, long)]).longest == 7
    assert DataSets([Prompt((1,) * 9, "", {}, 0)]).longest == 0


def test_a_task_without_the_rows_is_told(characters: PreTrainedTokenizerBase) -> None:
    class Prompts:
        def prompt_rows(self) -> list[Any]:
            return []

    with pytest.raises(
        ValueError, match=r"needs data\.task to have preference_rows\(\), and Prompts .* data\.kind=prompts"
    ):
        read_sets(DataConfig(kind="preferences", task=Prompts()), characters)
    with pytest.raises(ValueError, match=r"data\.path is not set; give a file"):
        read_sets(DataConfig(kind="preferences"), characters)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "pairs"}, "data.kind=pairs is unknown; use prompts, demonstrations, preferences, feedback"),
        ({"train_on": "prompts"}, "data.train_on=prompts is unknown; use responses, all"),
        ({"too_long": "cut"}, "data.too_long=cut is unknown; use error, drop"),
        ({"prompts_per_step": 0}, "data.prompts_per_step=0 must be at least 1"),
        ({"max_tokens": 1}, "data.max_tokens=1 must be at least 2"),
        (
            {"kind": "preferences", "train_on": "all"},
            "data.train_on=all is for data.kind=demonstrations, not preferences",
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_settings(DataConfig(**settings), "data")
    check_settings(DataConfig(), "data")


@pytest.mark.parametrize("kind", ["prompts", "demonstrations", "preferences", "feedback"])
def test_what_is_dropped_is_counted_of_both_files(
    characters: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    """2 of 4 rows to train on are too long, and 1 of 2 held-out ones; a pair gives two answers with feedback."""
    row = {"prompts": {"prompt": "1+2="}, "demonstrations": {"prompt": "1+2=", "completion": "#3"}}.get(kind, PAIR)
    long = {**row, "prompt": "1" * 70}
    path, held = file_of(tmp_path, row, long, row, long), file_of(tmp_path, long, row)
    limits = {**LIMITS, "prompts_per_step": 2}
    sets = read_sets(DataConfig(path=path, eval_path=held, kind=kind, too_long="drop", **limits), characters)
    each = 2 if kind == "feedback" else 1
    assert (sets.left_out.total(), sets.heldout_left_out.total()) == (2 * each, 1)
    assert sets.metrics() == {"data/left_out": 2.0 * each, "data/heldout_left_out": 1.0}
    assert len(sets.training) == 2 * each
    assert read_sets(DataConfig(path=file_of(tmp_path, row, row), kind=kind, **limits), characters).metrics() == {}
    for refusing in ("error", "stop"):
        with pytest.raises(
            ValueError, match=r":2: .* tokens, more than data\.max_\w*tokens=\d+;.* data\.too_long=drop"
        ):
            read_sets(DataConfig(path=path, kind=kind, too_long=refusing, **limits), characters)
    with pytest.raises(ValueError, match=r"data\.max_\w*tokens=\d+"):
        read_sets(DataConfig(path=file_of(tmp_path, long, long), kind=kind, too_long="drop", **limits), characters)
    only = file_of(tmp_path, long)
    with pytest.raises(ValueError, match=r"data\.max_\w*tokens=\d+"):
        read_sets(DataConfig(path=path, eval_path=only, kind=kind, too_long="drop", **limits), characters)


def test_a_wrong_row_stops_or_is_skipped_and_counted(characters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "completion": "2"}
    path = Path(file_of(tmp_path, row, {"prompt": "1+1="}, {**row, "completion": " "}, row))
    path.write_text(path.read_text() + "{broken\n" + json.dumps({**row, "prompt": "1" * 70}) + "\n")
    limits = {**LIMITS, "prompts_per_step": 2}
    data = DataConfig(path=str(path), eval_path=str(path), kind="demonstrations", too_long="drop", **limits)
    with pytest.raises(ValueError, match=rf"^{path}:2: a demonstration is one of"):
        read_sets(data, characters)
    sets = read_sets(replace(data, on_error="skip"), characters)
    assert [answer.index for answer in sets.training] == [0, 1]  # type: ignore[union-attr]
    assert sets.left_out == sets.heldout_left_out == {"wrong rows": 3, "too long": 1}
    assert sets.metrics() == {"data/left_out": 4.0, "data/heldout_left_out": 4.0}
    assert [error.split(" ")[0] for error in sets.wrong[:3]] == [f"{path}:2:", f"{path}:3:", f"{path}:5"]
    with pytest.raises(ValueError, match=rf"^{path}:6: the demonstration has 72 tokens"):  # data.too_long's business
        read_sets(replace(data, on_error="skip", too_long="error"), characters)
    only = replace(data, path=file_of(tmp_path, {"a": 1}), on_error="skip")
    with pytest.raises(
        ValueError, match=r"no demonstration is left .wrong rows: 1.; .* Skipped: .*:1: a demonstration is one of"
    ):
        read_sets(only, characters)


@pytest.mark.parametrize("kind", ["prompts", "demonstrations", "preferences", "feedback"])
def test_a_streamed_set_gives_the_examples_of_one_in_memory(
    characters: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    rows = {
        "prompts": {"prompt": "1+{}="},
        "demonstrations": {"prompt": "1+{}=", "completion": "#3"},
        "preferences": {"query": "1+{}=", "response": ["#3", "#4", "5"], "score": [1, 2, 3]},
    }
    row = json.dumps(rows.get(kind, PAIR | {"prompt": "1+{}="}))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row.replace("{}=", f"{n}=") + "\n" for n in range(300)))
    data = DataConfig(path=str(path), kind=kind, shuffle=False, **LIMITS)
    whole, streamed = (read_sets(replace(data, streaming=streaming), characters) for streaming in (False, True))
    assert isinstance(streamed.training, StreamedExamples) and len(streamed.training) == 300
    each = len(whole.training) // 300
    assert len(streamed.known) == 256 * each
    rows_of = ExampleStream(streamed.training, 0, shuffle=False, batch=4)
    taken = rows_of.take(300 * each)
    assert [tokens_of(row) for row in taken] == [tokens_of(row) for row in whole.training]  # type: ignore[union-attr]
    assert streamed.longest == (0 if kind == "prompts" else LIMITS["max_tokens"])
    assert streamed.training_digests() == read_sets(replace(data, streaming=True), characters).training_digests()
    with pytest.raises(ValueError, match=r"data\.prompts_per_step=301 is more than the 300 rows"):
        read_sets(replace(data, streaming=True, prompts_per_step=301), characters)


def tokens_of(row: Any) -> Any:
    return (
        (row.chosen.tokens, row.rejected.tokens, row.chosen.fields)
        if isinstance(row, Pair)
        else (row.tokens, row.fields)
    )


def test_large_sets_are_streamed(characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner.data.sets.STREAMED_ROWS", 39)
    data = DataConfig(task=TASK, **LIMITS)  # 40 prompts
    assert isinstance(read_sets(data, characters).training, StreamedExamples)
    assert not isinstance(read_sets(replace(data, streaming=False), characters).training, StreamedExamples)
    assert not isinstance(read_sets(replace(data, kind="preferences"), characters).training, StreamedExamples)
