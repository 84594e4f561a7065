"""Everything that can be known wrong before a model is built or a process group made; `mode=check` says what a job needs.

In: a `Config` and the files that it names. Out: what the job will run with, or a ValueError that names the setting and the
values that would work.
"""
