"""The global random states of this process: seeded, saved and restored.

What is sampled does not depend on them: each request has a seed of its own. They are for loops and rewards of the user's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from aligner.trainer.engine import TrainEngine


def seed_all(seed: int) -> None:
    """Python's, numpy's and torch's; the same on every rank, so that a loop that draws stays in lockstep."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_random_states(engines: Mapping[str, type[TrainEngine]]) -> dict[str, Any]:
    """Python's, numpy's, torch's and, by name, each training backend's, as JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    for name, engine in engines.items():
        states[name] = {generator: _text(state) for generator, state in engine.random_states().items()}
    return states


def restore_random_states(states: Mapping[str, Any], engines: Mapping[str, type[TrainEngine]]) -> None:
    """Back to what `save_random_states` returned. A backend that the earlier run did not use starts with fresh states."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))
    for name in engines.keys() & states.keys():
        engines[name].set_random_states({generator: _bytes(text) for generator, text in states[name].items()})


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()
