"""Patches of Megatron-core that hold on every device."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import torch

from aligner.trainer.megatron import cpu

with warnings.catch_warnings():  # that Apex is absent
    warnings.simplefilter("ignore")
    import aligner.trainer.megatron.model  # noqa: F401  (Megatron's functions are decorated while they are imported)


def compiled() -> list[str]:
    """Megatron's functions and methods that torch.compile has wrapped."""
    names: list[str] = []
    for module in [value for name, value in list(sys.modules.items()) if name.startswith("megatron.core.")]:
        spaces: list[dict[str, Any]] = [vars(module)]
        spaces += [
            dict(vars(one)) for one in vars(module).values() if isinstance(one, type) and "megatron" in one.__module__
        ]
        for space in spaces:
            for name, value in space.items():
                if isinstance(value, types.FunctionType) and "_torchdynamo_orig_callable" in vars(value):
                    names.append(f"{module.__name__}.{name}")
    return names


def test_nothing_of_megatron_is_compiled() -> None:
    from megatron.core.fusions import fused_bias_dropout

    before = fused_bias_dropout.bias_dropout_add_fused_train
    fused_bias_dropout.bias_dropout_add_fused_train = torch.compile(
        getattr(before, "_torchdynamo_orig_callable", before)
    )
    assert compiled()
    cpu._leave_functions_uncompiled()
    assert not compiled()
