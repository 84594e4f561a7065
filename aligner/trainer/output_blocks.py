"""Sizes of the blocks in which the output layer's logits are made, and the memory that they take (no torch)."""

from __future__ import annotations

BLOCK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits of one block, at most, by type of device: 64 and 256 MiB of float32."""

BUFFERS = 3
"""Float32 tensors of a block's size that are there at the same time, at most: logits, exponentials, and the block's before."""


def output_layer_bytes(tokens: int, vocab: int, hidden: int, element_bytes: int, device: str) -> float:
    """Bytes beside weights and gradients that log-probabilities of `tokens` tokens and their gradients take, at most.

    Args:
        vocab: columns on this rank.
        hidden: width of the hidden states, which are taken once as they are and once as a float32 gradient.
        element_bytes: of a weight.
    """
    block = min(tokens * vocab, max(BLOCK_LOGITS[device], tokens))
    return float(BUFFERS * 4 * block + tokens * hidden * (2 * element_bytes + 4))
