"""The SPMD runtime: every rank runs the same loop; a role's results stay on its ranks and move when another role reads them.

In: a placement (role -> ranks and parallel sizes). Out: a `World`, one `Mesh` per role, `Role` calls that return `Ref`s.
"""
