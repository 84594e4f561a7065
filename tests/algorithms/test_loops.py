"""What loops are made of, on real ranks: dynamic sampling, the reference's sums, evaluation on held-out pairs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.algorithms.conftest import alike
from tests.conftest import Ranks

LAYOUTS = {"one rank": (1, []), "data 2": (2, []), "tensor 2": (2, ["placement.policy.tensor=2"])}
Said = dict[str, Any]


@pytest.fixture(scope="module")
def folder(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task with a scorer/, a model with a scalar head that is not 0."""
    folder = Path(shutil.copytree(task.folder, tmp_path_factory.mktemp("loops") / "task"))
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder / "model", num_labels=1)
    scorer = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_pretrained(folder / "scorer")
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copy(file, folder / "scorer")
    return folder


@pytest.fixture(params=LAYOUTS)
def said(request: pytest.FixtureRequest, cache: dict[str, Said], folder: Path, ranks: Ranks) -> Said:
    """What all ranks say alike under a layout."""
    if request.param not in cache:
        size, overrides = LAYOUTS[request.param]
        cache[request.param] = alike(
            ranks(size).run("tests.algorithms.loops_on_ranks:run_loops", folder, overrides, seconds=200)
        )
    return cache[request.param]


@pytest.fixture(scope="module")
def cache() -> dict[str, Said]:
    return {}


REPORT = ("sampled_groups", "signal_fraction", "batch_filled")
SAMPLED: dict[str, tuple[list[tuple[int, float | None]], tuple[float, ...], int]] = {
    # (group, reward) of each row; the report; batches of prompts that were left
    "no dynamic sampling": ([(0, 1), (0, 1), (1, 1), (1, 0)], (), 1),
    "full at once": ([(0, 1), (0, 0), (1, 0), (1, 1)], (2, 1.0, 1.0), 1),
    "a group replaced": ([(0 + 1, 1), (1, 0), (3, 0), (3, 1)], (4, 0.5, 1.0), 1),
    "too many found": ([(1, 1), (1, 0), (2, 2), (2, 0)], (4, 0.75, 1.0), 0),
    "the bound": ([(1, 1), (1, 0)], (6, 1 / 6, 0.5), 1),
    "none at all": ([(2, 3), (2, 3), (3, 4), (3, 4)], (4, 0.0, 0.0), 0),
    "unparsable": ([(1, 1), (1, 0), (3, 0), (3, 1)], (4, 0.5, 1.0), 0),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_groups_of_equal_rewards_are_replaced_within_the_bound(name: str, said: Said) -> None:
    found = said[f"sampling {name}"]
    rows, report, left = SAMPLED[name]
    assert [tuple(row) for row in found["rows"]] == rows
    assert found["report"] == pytest.approx(dict(zip(REPORT, report, strict=False)))
    assert found["left"] == left


def log_likelihoods(folder: Path, rows: list[tuple[str, str]]) -> list[float]:
    """log p(answer, end | prompt) by transformers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = []
    for prompt, answer in rows:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer)]
        tokens = torch.tensor([*ids[0], *ids[1], tokenizer.eos_token_id])
        logp_TV = model(tokens[None]).logits[0].log_softmax(-1)
        steps = range(len(ids[0]), len(tokens))
        found.append(math.fsum(logp_TV[t - 1, tokens[t]].item() for t in steps))
    return found


def json_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["pairs", "feedback"])
def test_the_reference_is_asked_once_for_each_row(kind: str, said: Said, folder: Path) -> None:
    found = said[f"sums {kind}"]
    assert found["asked"] == [1, 2, 3, 3, 3, 3], "the second epoch asks nothing"
    if kind == "pairs":
        rows = json_rows(folder / "preferences.jsonl")[:8]
        asked = {f"{i} {n}": (row["prompt"], row[side]) for i, row in enumerate(rows) for n, side in enumerate(("chosen", "rejected"))}  # fmt: skip
    else:
        rows = json_rows(folder / "feedback.jsonl")[:8]
        asked = {f"{i} 0": (row["prompt"], row["completion"]) for i, row in enumerate(rows)}
    assert found["seen"].keys() == asked.keys()
    for (key, of), wanted in zip(asked.items(), log_likelihoods(folder, list(asked.values())), strict=True):
        assert found["seen"][key] == pytest.approx([wanted] * len(found["seen"][key]), rel=1e-6), of
        assert len(set(found["seen"][key])) == 1 and len(found["seen"][key]) >= 2


def test_pairs_are_judged_as_transformers_would(said: Said, folder: Path) -> None:
    rows = json_rows(folder / "heldout_preferences.jsonl")
    sides = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    logp = log_likelihoods(folder, sides)
    check(said["evaluation policy"], [logp[i] - logp[i + 1] for i in range(0, len(logp), 2)], 1e-4)
    # a reference that is the policy itself: nothing is preferred, and chance is what is left
    check(said["evaluation policy and reference"], [0.0] * len(rows), 1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "scorer", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "scorer")
    ids = [tokenizer.encode(prompt + answer, add_special_tokens=False) for prompt, answer in sides]
    score = [model(torch.tensor([[*row, tokenizer.eos_token_id]])).logits.item() for row in ids]
    margins = [score[i] - score[i + 1] for i in range(0, len(score), 2)]
    assert 0 < sum(margin > 0 for margin in margins) < len(margins)
    check(said["evaluation reward_model"], margins, 1e-5)


def test_demonstrations_are_judged_as_transformers_would(said: Said, folder: Path) -> None:
    rows = [(row["prompt"], row["completion"]) for row in json_rows(folder / "heldout_demonstrations.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trained = sum(len(tokenizer.encode(answer, add_special_tokens=False)) + 1 for _, answer in rows)
    wanted = -math.fsum(log_likelihoods(folder, rows)) / trained
    assert said["evaluation demonstrations"] == {"heldout_loss": pytest.approx(wanted, rel=1e-6)}


def check(found: dict[str, float], margins: list[float], off: float) -> None:
    share = sum(0.5 if margin == 0 else float(margin > 0) for margin in margins) / len(margins)
    assert found["heldout_pair_accuracy"] == found["accuracy"] == share
    assert found["heldout_margin"] == pytest.approx(sum(margins) / len(margins), abs=off)
