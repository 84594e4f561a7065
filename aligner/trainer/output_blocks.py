"""Sizes of the blocks in which the output layer's logits are made, and the memory that they take (no torch)."""

from __future__ import annotations

BLOCK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits of one block, at most, by type of device: 64 and 256 MiB of float32."""

KEPT_BLOCKS = 4
"""Blocks whose exponentials stay from the forward to the backward, which need not make their logits again: one matrix product
out of four."""


def output_layer_bytes(
    tokens: int, vocab: int, hidden: int, element_bytes: int, device: str, grad: bool = True
) -> float:
    """Bytes beside weights and gradients that log-probabilities of `tokens` tokens take, at most.

    Args:
        vocab: columns on this rank.
        hidden: width of the hidden states, which are taken once as they are and once as a float32 gradient.
        element_bytes: of a weight.
        grad: with their gradients and the entropy. Without, the exponentials take the logits' place; with 16-bit weights
            the product is there beside them.
    """
    blocks = -(-vocab // max(1, BLOCK_LOGITS[device] // max(1, tokens)))
    columns = -(-vocab // blocks)
    block = tokens * columns
    # with 16-bit weights, and on a CPU (`products.add_product`), products are there beside what they are added to
    product = element_bytes if element_bytes < 4 or device == "cpu" else 0
    if not grad:
        return float((4 + (product if element_bytes < 4 else 0)) * block + tokens * hidden * element_bytes)
    # beside the exponentials that are kept, one block's logits, or later the gradient of its rows of the weight
    of_blocks = min(KEPT_BLOCKS, blocks) * 4 * block + max(4 * block, product * columns * hidden)
    return float(of_blocks + tokens * hidden * (element_bytes + 4 + product))
