"""The lockstep machine: every rank runs the same loop, values have homes, data moves when a role reads it.

In: a placement (role -> ranks and parallel sizes). Out: a `World`, one `Mesh` per role, `Role` calls that return `Ref`s.
"""
