"""Hangs, dead ranks, memory: what ends a job that can go no further, and the report that says why.

In: what each rank is doing, its heartbeats, its lockstep journal. Out: one fault report with every rank's state, under
run_dir/faults; timelines; a process that leaves with its temporary files.
"""
