"""What is told apart between the versions of Megatron-core: the parts of an MLP's spec."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from aligner.trainer.megatron.versions import submodules_of


def test_the_version_is_the_one_of_this_python() -> None:
    assert version("megatron-core") == ("0.16.1" if sys.version_info < (3, 12) else "0.19.2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parts_of_an_mlps_spec() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    parts = submodules_of(get_gpt_layer_local_spec(normalization="RMSNorm").submodules.mlp)
    assert (parts.linear_fc1, parts.linear_fc2) == (ColumnParallelLinear, RowParallelLinear)
