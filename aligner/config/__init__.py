"""Settings: one frozen dataclass composed by Hydra, checked once, before any process group is made (no torch).

In: conf/*.yaml, overrides on the command line, dataclasses that stand beside their owners. Out: a `Config`; `--help`; what
differs from a checkpoint's configuration; values without their secrets.
"""
