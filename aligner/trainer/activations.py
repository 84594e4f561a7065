"""What a training backend's estimate of activation memory is asked, and what it answers (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from aligner.spmd.mesh import Mesh


@dataclass(frozen=True)
class Microbatch:
    """What is computed together."""

    tokens: int
    """Of all rows, summed over context-parallel ranks."""
    longest: int
    """Of its longest row."""
    alike: bool = False
    """All rows have one length: attention needs no padded copies."""
    predicting: float = 1.0
    """Fraction of the tokens that pass through the output layer, at most: those before a trained token."""

    def on_rank(self, mesh: Mesh, sequence_parallel: bool) -> int:
        """Tokens that the tensor-parallel ranks of one context-parallel rank share, padded."""
        multiple = mesh.tensor if sequence_parallel else 1
        return max(1, -(-self.tokens // (mesh.context * multiple))) * multiple


@dataclass(frozen=True)
class Activations:
    """Bytes that a role call takes on a rank beside what the role holds, at most."""

    update: float
    """The forward and backward of a microbatch, or of those that a pipeline stage has begun."""
    inference: float
    """Log-probabilities, values or scores."""
