"""Megatron's random number generators of this process, one for each kind of parallel region."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """The state of each generator, as uint8."""
    return {name: state for name, state in get_cuda_rng_tracker().get_states().items() if isinstance(state, Tensor)}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Back to what `random_states` returned; generators that are not named keep theirs."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), **states})
