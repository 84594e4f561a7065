"""Every family of transformers with one decoder: the engine trains it as transformers does, or says before a model is built why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.models.read_spec import read_spec
from aligner.trainer.fsdp.checks import check_trains
from tests.conftest import Ranks
from tests.trainer.fsdp.every_family import model_types, save_small

REFUSALS = ("engine=fsdp does not support it", "not supported by engine=fsdp", "no language model of one decoder")


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # transformers' own, of what torch no longer recommends
@pytest.mark.parametrize("model_type", model_types())
def test_trains_or_is_refused(ranks: Ranks, tmp_path: Path, model_type: str) -> None:
    save_small(model_type, tmp_path / model_type)
    refusal = None
    try:
        check_trains(read_spec(tmp_path / model_type), "policy")
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert any(words in refusal for words in REFUSALS), refusal
        return
    (worst,) = ranks(1).run("tests.trainer.fsdp.parity_on_ranks:check", tmp_path / model_type, tmp_path)
    assert worst["logprobs"] < 2e-5 and worst["gradients"] < 3e-4, worst
