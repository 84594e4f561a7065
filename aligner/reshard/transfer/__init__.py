"""A plan carried out on one rank: point-to-point messages, shared memory between ranks of one host, proofs, statistics."""
