"""Fault detection: heartbeats, hang and death detection, lockstep checks, the fault report, timelines, clean process exit.

In: each rank's current activity, heartbeats and journal of role calls. Out: the job is ended with one report of all ranks'
states under run_dir/faults; timelines; temporary files removed at exit.
"""
