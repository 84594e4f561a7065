"""The roles of a job, built from its configuration: each on its own ranks, with its own parallel sizes.

In: a checked configuration, the world, a mesh for each role. Out: `Roles`, what a loop calls.
"""
