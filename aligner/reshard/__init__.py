"""6. policy -> rollout: weights move between any two layouts, each byte once, and every copy is proven.

In: which region of which logical tensor each rank's storages hold, on both sides.
Out: written storages and a ledger row.
"""
