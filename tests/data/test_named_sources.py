"""data.sources: each source's own settings, and mistakes in them; sources as read and drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from aligner.bounds import check_settings
from aligner.data.config import DataConfig
from aligner.data.mixture_config import CurriculumConfig, MixtureConfig
from aligner.data.named_sources import ALONE, named_sources
from aligner.data.prompts import Prompt
from aligner.data.sets import MixedExamples, read_sets
from aligner.data.tokenized_answer import TokenizedAnswer
from tests.data.tokenizer_kinds import tokenizer_of


def test_a_path_alone_is_one_source() -> None:
    (source,) = named_sources(DataConfig(path="rows.jsonl"))
    assert (source.name, source.setting, source.data.path, source.weight) == (ALONE, "data.path", "rows.jsonl", 1.0)


def test_a_source_has_its_own_settings_over_those_of_all() -> None:
    data = DataConfig(
        sources={
            "a": {"path": "a.jsonl", "weight": 2},
            "b": {"path": "b.jsonl", "system_prompt": "", "streaming": False},
        },
        system_prompt="Be brief.",
        chat_template_kwargs={"x": 1, "y": 1},
    )
    data.sources["b"]["chat_template_kwargs"] = {"y": 2}
    a, b = named_sources(data)
    assert (a.setting, a.weight, a.data.path, a.data.system_prompt) == (
        "data.sources.a.path",
        2.0,
        "a.jsonl",
        "Be brief.",
    )
    assert (b.weight, b.data.system_prompt, b.data.streaming, a.data.streaming) == (1.0, "", False, None)
    assert (a.data.chat_template_kwargs, b.data.chat_template_kwargs) == ({"x": 1, "y": 1}, {"x": 1, "y": 2})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "data.path is not set; give a file, a folder or a glob of them, several sources as data.sources.NAME.path"),
        ({"path": "x", "sources": {"a": {"path": "y"}}}, "data.sources=a and data.path are both set; make data.path one of"),
        ({"sources": {"a": "y"}}, "data.sources.a=y is not possible; set its keys, such as data.sources.a.path=FILE"),
        ({"sources": {"a": {}}}, "data.sources.a.path is not set; give its rows' file"),
        ({"sources": {"a b": {"path": "y"}}}, "data.sources.a b: a source's name is a word"),
        ({"sources": {"a": {"path": "y", "wieght": 2}}}, "there is no setting data.sources.a.wieght; data.sources.a has path"),
        ({"sources": {"a": {"path": "y", "weight": "much"}}}, "data.sources.a.weight: Value 'much' of type 'str' could not"),
        ({"sources": {"a": {"path": "y", "weight": 0}}}, "data.sources.a.weight=0.0 must be more than 0; leave the source out"),
        ({"sources": {"a": {"path": "y", "weight": -1}}}, "data.sources.a.weight=-1.0 must be more than 0"),
        ({"sources": {"a": {"path": "y", "weight": float("inf")}}}, "data.sources.a.weight=inf must be more than 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        named_sources(DataConfig(**data))
    assert str(error.value).startswith(reason)


CURRICULUM = {"by": "column", "column": "level"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mixture": MixtureConfig(batches="one")}, "data.mixture.batches=one is unknown; use mixed, single"),
        (
            {"mixture": MixtureConfig(exhausted="stop")},
            "data.mixture.exhausted=stop is unknown; use repeat, first, all",
        ),
        ({"mixture": MixtureConfig(temperature=0)}, "data.mixture.temperature=0 must be more than 0, or null"),
        (
            {"mixture": MixtureConfig(replacement=True, exhausted="all")},
            "data.mixture.exhausted=all: with data.mixture.replacement=true no source is ever exhausted",
        ),
        ({"curriculum": CurriculumConfig(by="size")}, "data.curriculum.by=size is unknown; use none, column, success"),
        ({"curriculum": CurriculumConfig(column="x")}, "data.curriculum has settings, but by=none orders nothing"),
        ({"curriculum": CurriculumConfig(by="column")}, "data.curriculum.column=None needs the name of a field"),
        ({"curriculum": CurriculumConfig(by="success", column="x")}, "data.curriculum.column=x is for by=column"),
        (
            {"curriculum": CurriculumConfig(**CURRICULUM, order="easiest")},
            "data.curriculum.order=easiest is not an order by column; use ascending or descending",
        ),
        (
            {"curriculum": CurriculumConfig(**CURRICULUM, retire_at=1.0)},
            "data.curriculum.retire_at=1.0 is for by=success; use null",
        ),
        (
            {"curriculum": CurriculumConfig(by="success", fraction=0)},
            "data.curriculum.fraction=0 must be more than 0 and between 0 and 1",
        ),
        (
            {"curriculum": CurriculumConfig(by="success"), "kind": "demonstrations"},
            "data.curriculum.by=success measures how often prompts are solved, and data.kind=demonstrations has no samples",
        ),
        (
            {"curriculum": CurriculumConfig(**CURRICULUM), "mixture": MixtureConfig(replacement=True)},
            "data.mixture.replacement=true draws rows at random, so data.curriculum.by=column has no order to follow",
        ),
    ],
)
def test_settings_that_contradict_are_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_settings(DataConfig(**settings), "data")
    assert str(error.value).startswith(reason)


def file_of(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


LIMITS: dict[str, Any] = {"prompts_per_step": 2, "max_prompt_tokens": 64}


def test_rows_of_several_sources_are_numbered_one_after_the_other(
    characters: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    paths = {
        name: file_of(tmp_path, f"{name}.jsonl", *({"prompt": f"{name}{i}"} for i in range(n)))
        for name, n in (("1", 3), ("2", 2))
    }
    sources = {f"s{name}": {"path": path, "weight": int(name)} for name, path in paths.items()}
    sets = read_sets(DataConfig(sources=sources, **LIMITS), characters)
    assert isinstance(sets.training, MixedExamples) and len(sets.training) == 5
    assert {name: [(row.text, row.index) for row in part] for name, part in sets.parts.items()} == {
        "s1": [("10", 0), ("11", 1), ("12", 2)], "s2": [("20", 3), ("21", 4)],
    }  # fmt: skip
    assert sets.training.weights == {"s1": 1.0, "s2": 2.0} and len(sets.known) == 5
    assert set(sets.training_digests()) == {"s1", "s2"}


def test_each_source_has_its_own_system_prompt(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = file_of(tmp_path, "a.jsonl", row, row)
    data = DataConfig(
        sources={"a": {"path": path}, "b": {"path": path, "system_prompt": "Rhyme."}}, kind="demonstrations", **LIMITS
    )
    tokenizer = tokenizer_of("byte_level", "chatml")
    parts = read_sets(data, tokenizer).parts
    texts = {}
    for name, part in parts.items():
        assert isinstance(part, list) and isinstance(part[0], TokenizedAnswer)
        texts[name] = tokenizer.decode(part[0].tokens)
    assert "Rhyme." in texts["b"] and "Rhyme." not in texts["a"]


@pytest.mark.parametrize(
    ("second", "settings", "reason"),
    [
        ("", {}, "data.sources.b.path={b} has no rows"),
        ('{"prompt": "123456789"}\n', {"max_prompt_tokens": 4, "too_long": "drop"}, "data.sources.b.path={b}: no prompt is left"),
        ('{"text": "1"}\n', {}, "{b}:1: a row needs 'prompt' or 'messages'"),
        ('{"prompt": "1"}\n', {"prompts_per_step": 4}, "data.prompts_per_step=4 is more than the 2 rows of data.sources.a.path="),
        (
            '{"prompt": "1"}\n',
            {"streaming": True, "mixture": MixtureConfig(exhausted="all")},
            "data.mixture.exhausted=all needs all rows in memory, and data.sources.a.path={a} (1 rows) is streamed",
        ),
        (
            '{"prompt": "1"}\n',
            {"streaming": True, "curriculum": CurriculumConfig(by="success")},
            "data.curriculum.by=success needs all rows in memory",
        ),
        ('{"prompt": "1"}\n', {"chat_template_kwargs": {"x": 1}}, "data.sources.a.chat_template_kwargs.x is not a variable"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_used_is_named(
    characters: PreTrainedTokenizerBase, tmp_path: Path, second: str, settings: dict[str, Any], reason: str
) -> None:
    a, b = file_of(tmp_path, "a.jsonl", {"prompt": "1"}), tmp_path / "b.jsonl"
    b.write_text(second)
    data = DataConfig(sources={"a": {"path": a}, "b": {"path": str(b)}}, prompts_per_step=1, max_prompt_tokens=64)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_sets(replace(data, **settings), characters)
    assert str(error.value).startswith(reason.format(a=a, b=b)), error.value


def test_a_streamed_source_beside_one_in_memory(characters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    a = file_of(tmp_path, "a.jsonl", *({"prompt": f"1{i}"} for i in range(4)))
    b = file_of(tmp_path, "b.jsonl", *({"prompt": f"2{i}"} for i in range(3)))
    sources = {"a": {"path": a}, "b": {"path": b, "streaming": True}}
    sets = read_sets(DataConfig(sources=sources, **LIMITS), characters)
    streamed = sets.parts["b"]
    assert not isinstance(streamed, list) and [row.index for row in streamed.examples(2)] == [6]  # type: ignore[union-attr]
    assert [row.text for row in sets.known if isinstance(row, Prompt)] == [f"1{i}" for i in range(4)] + [
        f"2{i}" for i in range(3)
    ]
