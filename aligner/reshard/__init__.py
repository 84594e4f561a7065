"""6. policy -> rollout: weight sync between any two parallel layouts; each byte is sent once, every copy is verified.

In: two `ShardedWeights`: which region of which checkpoint tensor each rank holds, and the memory itself.
Out: a written destination, and the statistics of each sync.

Imports no role, no engine and no model family. Read in this order: weights (what an end of a transfer is) -> sync ->
plan/ (who sends which region to whom) -> message/ (the contents of a message) -> transfer/ (sending and verifying it);
local: copies within one process.
"""
