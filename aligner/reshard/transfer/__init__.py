"""A plan carried out on one rank: connections, shared memory between neighbours, proofs, statistics."""
