"""6. policy -> rollout: weights move between any two layouts, each byte once, and every copy is proven.

In: two `ShardedWeights`: which region of which checkpoint tensor each rank holds, and the memory itself.
Out: a written destination, and the statistics of each sync.

Imports no role, no engine and no model family. Read in this order: weights (what an end of a transfer is) -> sync ->
plan/ (who sends what to whom) -> message/ (what is in a message) -> transfer/ (sending it); local: one process by itself.
"""
