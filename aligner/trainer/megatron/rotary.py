"""Rotary position embeddings of packed rows: inverse frequencies and angles, for each layer type of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aligner.models.rope import ORIGINAL, Rope
from aligner.models.spec import ModelSpec


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[rotary_dim / 2] float32, on the CPU: angle in radians per position, for each pair of dimensions."""
    dim = rope.rotary_dim(head_dim)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return SCALED[rope.rope_type](1.0 / rope.theta**exponent, rope)


def _unscaled(frequency: Tensor, rope: Rope) -> Tensor:
    """Unchanged; also for "dynamic", whose base grows only beyond max_position_embeddings (see `Rope.longest`)."""
    return frequency


def _linear_scaled(frequency: Tensor, rope: Rope) -> Tensor:
    """Chen et al. 2023: positions are divided by `factor`."""
    return frequency / float(rope.parameters["factor"])


def _llama3_scaled(frequency: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are multiplied by `factor`, medium ones interpolated."""
    factor, low, high = (rope.parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope.parameters[ORIGINAL] * frequency / (2 * torch.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (blend + (1 - blend) / factor)


def _yarn_scaled(frequency: Tensor, rope: Rope) -> Tensor:
    """YaRN, Peng et al. 2023, section 3.2: pairs with more than `beta_fast` rotations over the original context keep their
    frequency, those with fewer than `beta_slow` are interpolated by `factor`, with a linear ramp in between."""
    pairs = len(frequency)

    def pair_with_rotations(rotations: float) -> float:
        return pairs * math.log(rope.parameters[ORIGINAL] / (rotations * 2 * math.pi)) / math.log(rope.theta)

    low = pair_with_rotations(rope.parameters.get("beta_fast", 32))
    high = pair_with_rotations(rope.parameters.get("beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001  # avoid dividing by 0: a step instead of a ramp
    ramp = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return frequency / rope.parameters["factor"] * ramp + frequency * (1 - ramp)


def _longrope_scaled(frequency: Tensor, rope: Rope) -> Tensor:
    """LongRoPE, Ding et al. 2024, up to the original context: one factor per pair."""
    return frequency / torch.tensor(rope.parameters["short_factor"], dtype=torch.float32)


SCALED: Mapping[str, Callable[[Tensor, Rope], Tensor]] = {
    "default": _unscaled,
    "dynamic": _unscaled,
    "linear": _linear_scaled,
    "llama3": _llama3_scaled,
    "yarn": _yarn_scaled,
    "longrope": _longrope_scaled,
}
"""Scaling functions by rope_type."""


@dataclass(frozen=True)
class RotarySlice:
    """A layer type's slice of the angles that `PackedRotary` computes for all layer types."""

    start: int
    stop: int
    attention_factor: float
    """See `Rope.attention_factor`."""

    def scale_queries(self, query: Tensor) -> Tensor:
        """Multiply the rotated dimensions of [..., head_dim] by the square of the attention factor."""
        if self.attention_factor == 1.0:
            return query
        rotated, rest = query.tensor_split([self.stop - self.start], -1)
        return torch.cat([rotated * self.attention_factor**2, rest], -1)


def rotary_slices(spec: ModelSpec) -> list[tuple[Rope, RotarySlice]]:
    """The distinct rotary embeddings with their slices, in order; layer types with equal ones share a slice."""
    slices: list[tuple[Rope, RotarySlice]] = []
    stop = 0
    for rope in spec.rope.values():
        if all(rope != other for other, _ in slices):
            start, stop = stop, stop + rope.rotary_dim(spec.head_dim)
            slices.append((rope, RotarySlice(start, stop, rope.attention_factor)))
    return slices


def rotary_slice(spec: ModelSpec, rope: Rope) -> RotarySlice:
    """The slice of a layer type's angles."""
    return next(slice_ for other, slice_ in rotary_slices(spec) if other == rope)


class PackedRotary(nn.Module):
    """Rotary angles at the packed tokens' positions, instead of Megatron's table for positions 0..T-1.

    Each forward computes the angles of all layer types from `positions_T`, in which each row begins at 0, and passes them on
    as one tensor, so that recompute and pipelining use the right ones.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        super().__init__()
        frequencies = [inverse_frequencies(rope, spec.head_dim) for rope, _ in rotary_slices(spec)]
        # each frequency rotates dimensions i and i + rotary_dim / 2
        self.frequency = torch.cat([repeated for half in frequencies for repeated in (half, half)]).to(device)
        self.positions_T: Tensor | None = None

    def get_rotary_seq_len(self, *args: Any) -> int:
        """Megatron asks for the table's length, which is not used."""
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[T, 1, 1, sum of the tables' rotary dimensions] angles, float32."""
        assert self.positions_T is not None
        return torch.outer(self.positions_T.float(), self.frequency)[:, None, None, :]
