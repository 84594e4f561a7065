"""Defaults that depend on the device: what GPUs have kernels and room for, where it is not what suits a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRAINED = {"dtype": "bfloat16", "recompute": "full", "experts": "grouped", "overlap_grad_reduce": True}
"""float32 has no flash attention kernel, activations of long microbatches do not fit without recompute, one expert after
another launches a dozen kernels for each, and NCCL's kernels run beside those of the backward."""
_ENGINE = {"dtype": "bfloat16"}

DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cpu": {},
    "cuda": {
        "policy": _TRAINED,
        "critic": _TRAINED,
        "reward_model": _TRAINED,
        "rollout": _ENGINE,
        # Every message costs its two ends a synchronisation; of 256 MiB it is a hundredth of the copy.
        "reshard": {"bucket_mib": 256.0},
    },
}
"""Device -> section -> values in the place of the dataclasses'; every other default is the same on both."""

_SECTIONS = {"policy": "policy", "critic": "critic", "reward_model": "reward_model", "engine": "rollout"}


def section_defaults(device: str, section: str) -> Mapping[str, Any]:
    """Those of a section, of `models.NAME` by its kind. A frozen model takes the policy's values where it has none."""
    return DEFAULTS[device].get(_SECTIONS.get(section, section), {})


def default_note(section: str, name: str) -> str:
    """For `--help`: the default on a GPU where it is another than on a CPU."""
    values = DEFAULTS["cuda"].get(section, {})
    return f" (on GPUs {values[name]})" if name in values else ""
