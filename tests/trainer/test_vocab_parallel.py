"""Log-probabilities and entropy of split logits against torch's log_softmax in float64, values and gradients."""

from __future__ import annotations

import pytest

from tests.conftest import Ranks


@pytest.mark.parametrize("size", [1, 2])
def test_against_float64(ranks: Ranks, size: int) -> None:
    ranks(size).run("tests.trainer.vocab_parallel_on_ranks:check_against_float64")


@pytest.mark.parametrize("size", [1, 2])
def test_logprobs_without_the_entropys_gradient(ranks: Ranks, size: int) -> None:
    ranks(size).run("tests.trainer.vocab_parallel_on_ranks:check_logprobs_alone")
