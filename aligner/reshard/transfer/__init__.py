"""Execution of a plan on one rank: point-to-point messages, shared memory between ranks of one host, proofs, statistics."""
