"""The default task: right sums and columns, disjoint sets, and a model folder that transformers loads."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.data.column_addition import ColumnAddition, ModelShape, main, write_model
from aligner.data.sources.open import open_source
from aligner.data.sources.source import all_rows

SMALL = ColumnAddition(demonstrations=400, prompts=300, heldout=100)


def test_rows_are_right_and_in_the_configured_shares() -> None:
    demonstrations = [row for _, row in SMALL.demonstration_rows()]
    prompts = [row for _, row in SMALL.prompt_rows()]
    heldout = [row for _, row in SMALL.heldout_rows()]
    assert (len(demonstrations), len(prompts), len(heldout)) == (400, 300, 100)
    assert sum(row["completion"] == "#" + row["answer"] for row in demonstrations) == 240
    assert len({row["completion"][0] == "#" for row in demonstrations[:20]}) == 2
    for row in demonstrations + prompts + heldout:
        match = re.fullmatch(r"<bos>([1-9]\d\d)\+([1-9]\d\d)=", row["prompt"])
        assert match and int(match[1]) + int(match[2]) == int(row["answer"])
    assert all(row["completion"].rpartition("#")[2] == row["answer"] for row in demonstrations)
    assert len({row["prompt"] for row in demonstrations + prompts + heldout}) == 800


def test_the_seed_decides_and_training_sizes_leave_the_heldout_alone() -> None:
    same = ColumnAddition(demonstrations=400, prompts=300, heldout=100)
    assert same.demonstration_rows() == SMALL.demonstration_rows()
    assert same.prompt_rows() == SMALL.prompt_rows()
    larger = ColumnAddition(demonstrations=50_000, prompts=3000, heldout=100)
    assert larger.heldout_rows() == SMALL.heldout_rows()
    assert ColumnAddition(demonstrations=400, prompts=300, heldout=100, seed=1).heldout_rows() != SMALL.heldout_rows()


def test_few_additions_are_demonstrated_in_both_ways() -> None:
    """MicrobatchOutput often and in either style, an addition's prompt says nothing about the style."""
    rows = [row for _, row in ColumnAddition(demonstrations=3000, demonstrated=50, prompts=300).demonstration_rows()]
    assert len(rows) == 3000
    styles: dict[str, set[bool]] = {}
    for row in rows:
        styles.setdefault(row["prompt"], set()).add(row["completion"][0] == "#")
    assert len(styles) == 50
    assert set(map(len, styles.values())) == {2}


def additions(rows: list[tuple[str, dict[str, Any]]]) -> set[str]:
    return {row["prompt"] for _, row in rows}


def test_preferences_compare_a_right_and_a_wrong_answer_to_demonstrated_additions() -> None:
    task = ColumnAddition(demonstrations=400, prompts=300, heldout=100, preferences=4000)
    pairs, heldout = task.preference_rows(), task.heldout_preference_rows()
    assert (len(pairs), len(heldout)) == (4000, 100)
    assert additions(heldout) == additions(task.heldout_rows())
    assert not additions(pairs) & (additions(heldout) | additions(task.prompt_rows()))
    assert additions(pairs) == additions(
        ColumnAddition(demonstrations=1500, prompts=300, heldout=100).demonstration_rows()
    )
    malformed = 0
    for _, row in pairs + heldout:
        left, right = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["answer"] == str(left + right)
        assert row["chosen"].rpartition("#")[2] == row["answer"]
        number = re.search(r"#(\d+)$", row["rejected"])
        malformed += number is None
        assert number is None or int(number[1]) != left + right
    assert malformed / 4100 == pytest.approx(0.2, abs=0.02)
    direct = {side: sum(" " not in row[side] for _, row in pairs) / 4000 for side in ("chosen", "rejected")}
    assert direct == pytest.approx({"chosen": 0.1, "rejected": 0.1}, abs=0.015)  # the style tells nothing


def test_preferences_are_as_hard_as_they_are_set() -> None:
    sizes = {"demonstrations": 400, "prompts": 300, "heldout": 100, "preferences": 200}
    direct = ColumnAddition(**sizes, preferred_direct_fraction=1.0, malformed_fraction=0.0, wrong_digits=1)
    for _, row in direct.preference_rows():
        differing = [a != b for a, b in zip(row["chosen"], row["rejected"], strict=True)]
        assert (row["chosen"][0], sum(differing)) == ("#", 1)
    broken = ColumnAddition(**sizes, preferred_direct_fraction=0.0, malformed_fraction=1.0)
    assert all(re.search(r"#\d", row["rejected"]) is None for _, row in broken.preference_rows())
    assert direct.preference_rows() == ColumnAddition(**vars(direct)).preference_rows()
    other = ColumnAddition(**{**vars(direct), "seed": 1})
    assert direct.preference_rows() != other.preference_rows()
    fewer = ColumnAddition(**{**vars(direct), "preferences": 50, "demonstrations": 90})
    assert direct.heldout_preference_rows() == fewer.heldout_preference_rows()


def test_feedback_is_the_preferences_taken_apart() -> None:
    task = ColumnAddition(demonstrations=400, prompts=300, heldout=100, preferences=150)
    apart = [(row["prompt"], row["completion"], row["label"]) for _, row in task.feedback_rows()]
    pairs = [row for _, row in task.preference_rows()]
    together = [(row["prompt"], row["chosen"], True) for row in pairs]
    together += [(row["prompt"], row["rejected"], False) for row in pairs]
    assert sorted(apart) == sorted(together)
    assert sum(first[0] == second[0] for first, second in itertools.pairwise(apart)) < 15  # neighbours differ


def test_every_addition_of_a_small_task_is_dealt_once() -> None:
    task = ColumnAddition(digits=1, demonstrations=60, demonstrated=60, prompts=30, heldout=10)
    every = task.demonstration_rows() + task.prompt_rows() + task.heldout_rows()
    assert {row["prompt"] for _, row in every} == {f"<bos>{a}+{b}=" for a in range(10) for b in range(10)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"digits": 1}, "need 18396 distinct additions, but digits=1 has 100"),
        ({"digits": 0}, "digits=0 must be 1 or more"),
        ({"heldout": 0}, "heldout=0 must be 1 or more"),
        ({"direct_fraction": 1.5}, "direct_fraction=1.5 must be between 0 and 1"),
        ({"preferred_direct_fraction": -1}, "preferred_direct_fraction=-1 must be between 0 and 1"),
        ({"malformed_fraction": 2}, "malformed_fraction=2 must be between 0 and 1"),
        ({"wrong_digits": 0}, "wrong_digits=0 must be 1 or more"),
        ({"preferences": 0}, "preferences=0 must be 1 or more"),
    ],
)
def test_impossible_tasks_are_refused(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ColumnAddition(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_heads=3 must divide heads=2"):
        ModelShape(kv_heads=3)


def test_the_model_folder_loads_with_transformers(tmp_path: Path) -> None:
    write_model(tmp_path / "a", ModelShape(), seed=0)
    write_model(tmp_path / "b", ModelShape(), seed=1)
    model, other = (AutoModelForCausalLM.from_pretrained(str(tmp_path / name)) for name in "ab")
    # per layer: q, k, v and o 128x128, MLP 3 x 128x384, norms 2x128 and 2x64; embeddings 128x128, last norm
    by_hand = 3 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128 + 2 * 64) + 128 * 128 + 128
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 656_640
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert not model.lm_head.weight.equal(other.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "a"))
    logits = model(**tokenizer("<bos>137+485=", return_tensors="pt", return_token_type_ids=False)).logits
    assert logits.shape == (1, 9, 128)
    assert logits.isfinite().all()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == (2, True)


def test_the_command_writes_the_model_and_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--digits", "2", "--demonstrations", "40", "--prompts", "30", "--heldout", "20", "--preferences", "25"]
    main(["--out", str(tmp_path), *sizes, "--hidden", "64", "--layers", "1", "--seed", "3"])
    task = ColumnAddition(digits=2, demonstrations=40, prompts=30, heldout=20, preferences=25, seed=3)
    said = capsys.readouterr().out
    for name, wanted in (
        ("demonstrations", task.demonstration_rows()),
        ("prompts", task.prompt_rows()),
        ("heldout", task.heldout_rows()),
        ("preferences", task.preference_rows()),
        ("heldout_preferences", task.heldout_preference_rows()),
        ("feedback", task.feedback_rows()),
    ):
        assert f"{name}.jsonl" in said
        assert [row for _, row in all_rows(open_source(tmp_path / f"{name}.jsonl"))] == [row for _, row in wanted]
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "model")).config.hidden_size == 64
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--digits", "1"])
    assert "lower them or raise digits" in capsys.readouterr().err


def test_rows_are_made_without_importing_torch() -> None:
    program = (
        "import sys; from aligner.data import config, demonstrations, preferences, prompts, sets, tokenizer; "
        "from aligner.data.column_addition import ColumnAddition; ColumnAddition(demonstrations=9).prompt_rows(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
