"""Named formats: from a file in each schema, the ids and the trained tokens are those of TRL's own preparation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, SFTTrainer

from aligner.bounds import check_settings
from aligner.config.schema import CONF, compose_config, to_config
from aligner.data.columns import Columns
from aligner.data.config import DataConfig
from aligner.data.formats import FORMATS, last_boxed
from aligner.data.preferences import Pair
from aligner.data.prompts import Prompt
from aligner.data.sets import DataSets, read_sets
from aligner.data.tokenized_answer import TokenizedAnswer
from tests.data.chat_templates import TEMPLATES
from tests.data.format_rows import ALPACA, GSM8K, HH, SAMPLES, Sample, said, user
from tests.data.tokenizer_kinds import tokenizer_of

CHOSEN = ("chatml", "mistral", "gemma", "forgets_thought", "tools")
"""Plain; folds the system prompt into the first turn; has none and alternates; forgets reasoning of earlier turns; tools."""
CASES = [
    pytest.param(sample, template, id=f"{sample.format}-{sample.kind}-{number}-{template}")
    for number, sample in enumerate(SAMPLES)
    for template in CHOSEN
    if all(getattr(TEMPLATES[template], need) for need in sample.needs)
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def trl_sft(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """(ids, whether each is trained) as SFTTrainer prepares a row."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss="completion" in row)
    conversational = "messages" in row or isinstance(row["prompt"], list)
    args = SimpleNamespace(dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=conversational, max_length=None, shuffle_dataset=False)  # fmt: skip
    made: Any = SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list([row]), tokenizer, args, False, None, "train"
    )  # type: ignore[arg-type]
    return made[0]["input_ids"], [label != -100 for label in made[0]["labels"]]


def trl_dpo(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """'prompt_ids', 'chosen_ids' and 'rejected_ids' as DPOTrainer prepares a row."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    made: Any = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list([row]), tokenizer, args, "train")  # type: ignore[arg-type]
    return dict(made[0])


def read(sample: Sample, tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> DataSets:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(sample.row) + "\n")
    options = {"max_prompt_tokens": 1000, "max_tokens": 2000, "prompts_per_step": 1, **settings}
    return read_sets(DataConfig(path=str(path), kind=sample.kind, format=sample.format, **options), tokenizer)


@pytest.mark.parametrize(("sample", "template"), CASES)
def test_ids_and_masks_are_trl_s(sample: Sample, template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", template, marked=True)
    rows: Any = read(sample, tokenizer, tmp_path).training
    if sample.kind == "prompts":
        (prompt,) = rows
        assert isinstance(prompt, Prompt)
        assert list(prompt.tokens) == tokenizer.apply_chat_template(
            sample.trl["prompt"], add_generation_prompt=True, return_dict=False
        )
        check_fields(sample, prompt.fields)
    elif sample.kind == "demonstrations":
        ids, trained = trl_sft(sample.trl, tokenizer)
        last = rows[-1]
        assert isinstance(last, TokenizedAnswer) and list(last.tokens) == ids
        if len(rows) == 1:
            assert list(last.mask) == trained
        else:  # earlier turns are trained as they were generated, which this template does not render in the whole
            assert TEMPLATES[template].rewrites
            assert list(last.mask) == [turn and place >= last.prompt_len for place, turn in enumerate(trained)]
        check_fields(sample, last.fields)
    else:
        expected = trl_dpo({key: sample.trl[key] for key in ("prompt", "chosen", "rejected")}, tokenizer)
        sides = (rows[0].chosen, rows[0].rejected) if isinstance(rows[0], Pair) else rows
        for side, name in zip(sides, ("chosen_ids", "rejected_ids"), strict=True):
            assert list(side.tokens) == expected["prompt_ids"] + expected[name]
            assert side.prompt_len == len(expected["prompt_ids"]) or template == "forgets_thought"
            _, trained = trl_sft(
                {"prompt": sample.trl["prompt"], "completion": sample.trl[name.removesuffix("_ids")]}, tokenizer
            )
            assert list(side.mask) == trained
        check_fields(sample, sides[0].fields)


def check_fields(sample: Sample, fields: dict[str, Any]) -> None:
    assert {name: fields.get(name) for name in sample.fields} == sample.fields


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (Sample("gsm8k", "demonstrations", GSM8K, {}), {"prompt": GSM8K["question"], "completion": GSM8K["answer"]}),
        (
            Sample("alpaca", "demonstrations", {**ALPACA, "input": ""}, {}),
            {
                "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nTranslate to English.\n\n### Response:\n",
                "completion": "It is Paris.",
            },
        ),
    ],
)
def test_without_a_chat_template_texts_are_trl_s(sample: Sample, text: dict[str, str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    (row,) = read(sample, tokenizer, tmp_path, chat=False).training  # type: ignore[misc]
    assert isinstance(row, TokenizedAnswer)
    assert (list(row.tokens), list(row.mask)) == trl_sft(text, tokenizer)


def test_transcripts_without_a_chat_template_stay_as_they_are(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    (pair,) = read(Sample("hh_rlhf", "preferences", HH, {}), tokenizer, tmp_path, chat=False).training  # type: ignore[misc]
    assert isinstance(pair, Pair)
    assert tokenizer.decode(pair.chosen.tokens[: pair.chosen.prompt_len]) == HH["chosen"].removesuffix(" Paris")
    assert tokenizer.decode(pair.rejected.tokens) == HH["rejected"] + str(tokenizer.eos_token)


def test_every_format_has_samples() -> None:
    assert {sample.format for sample in SAMPLES} == set(FORMATS)


def test_the_documentation_has_every_format() -> None:
    page = (CONF.parent / "docs" / "data.md").read_text()
    for name, known in FORMATS.items():
        assert f"| `{name}` | {known.schema} | {', '.join(known.kinds)} | {known.of} |" in page


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "data").glob("*.yaml")))
def test_its_configuration_is_right(name: str) -> None:
    data = to_config(compose_config(["model.path=m", f"data={name}"])).data
    check_settings(data, "data")
    assert data.format is None or data.kind in FORMATS[data.format].kinds


def test_a_format_without_this_kind_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.format=gsm8k gives prompts, demonstrations, not data\.kind=preferences"
    ):
        DataConfig(format="gsm8k", kind="preferences").check()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} and \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("$\\boxed 7$", "7"), ("none", None), ("\\boxed{a", None),
        ("\\boxed{}", None), ("\\boxed {5}", "5"), ("\\fbox{3}", "3"), ("\\boxed\n{4}", "4"),
        ("\\boxed{\\left\\{1,2\\right.} x", "\\left\\{1,2\\right."), ("\\boxed{1\\\\}", "1\\\\"), ("\\boxed{\\}", None),
        ("\\boxed{2} and \\boxedness{3}", "2"), ("\\boxed{\\boxed{2}}", "2"), ("\\boxed{\\text{a} \\{1\\}}", "\\text{a} \\{1\\}"),
    ],
)  # fmt: skip
def test_the_last_box(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_columns_of_ones_own(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", "chatml")
    path = tmp_path / "rows.jsonl"
    row = {
        "q": {"text": "What is it?"},
        "turns": [{"content": "no"}, {"content": "Paris"}],
        "final.answer": "42",
        "id": 1,
    }
    path.write_text(json.dumps(row) + "\n")
    columns = {
        "prompt": "q.text",
        "completion": "turns[-1].content",
        "answer": "final.answer",
        "first": "turns[0].content",
    }
    data = DataConfig(path=str(path), kind="demonstrations", columns=columns, prompts_per_step=1)
    (plain,) = read_sets(data, tokenizer).training  # type: ignore[misc]
    assert isinstance(plain, TokenizedAnswer)
    assert (list(plain.tokens), list(plain.mask)) == trl_sft(
        {"prompt": "What is it?", "completion": "Paris"}, tokenizer
    )
    assert {name: plain.fields[name] for name in ("answer", "first", "id")} == {"answer": "42", "first": "no", "id": 1}
    (chat,) = read_sets(replace(data, chat=True), tokenizer_of("byte_level", "chatml", marked=True)).training  # type: ignore[misc]
    wanted = {"prompt": [user("What is it?")], "completion": [said("Paris")]}
    assert (list(chat.tokens), list(chat.mask)) == trl_sft(wanted, tokenizer_of("byte_level", "chatml", marked=True))


@pytest.mark.parametrize(
    ("columns", "row", "problem"),
    [
        (
            {"prompt": "question"},
            {"query": 1},
            r"there is no 'question' .data.columns.prompt=question.: the row has query",
        ),
        ({"prompt": "a.b"}, {"a": "text"}, "there is no 'a.b' .*: 'a' is str, without keys"),
        ({"prompt": "a[2]"}, {"a": [1, 2]}, "'a' is a list of 2"),
        ({"prompt": "a[0].c"}, {"a": [{"b": 1}]}, r"'a\[0\]' has b"),
        ({"prompt": "a["}, {}, r"data.columns.prompt=a\[ is no column"),
        ({"prompt": ""}, {}, "data.columns.prompt= is no column"),
        ("question", {}, "data.columns=question must name columns by our keys"),
    ],
)
def test_a_wrong_column(columns: Any, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Columns(columns).renamed(row, "p:1")


def test_renamed_columns_lose_their_names() -> None:
    row = {"question": "a", "answer": "b", "extra": {"x": 1}}
    renamed = Columns({"prompt": "question", "answer": "answer", "x": "extra.x"}).renamed(row, "p:1")
    assert renamed == {"prompt": "a", "answer": "b", "x": 1, "extra": {"x": 1}}
